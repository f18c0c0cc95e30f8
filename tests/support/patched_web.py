"""The web server with other limits: `python -m patched_web MODULE.NAME=NUMBER ... -- OPTIONS`; see web_viewer."""

import importlib
import sys

from larpixdaq.web import main

end = sys.argv.index("--")
for setting in sys.argv[1:end]:
    name, _, number = setting.partition("=")
    module, _, attribute = name.rpartition(".")
    vars(importlib.import_module(f"larpixdaq.web.{module}"))[attribute] = float(number)
sys.argv[1:] = sys.argv[end + 1 :]
sys.exit(main())
