import sys

from larpixdaq.cli import main

sys.exit(main())
