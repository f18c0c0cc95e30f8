import sys

from larpixdaq.web import main

sys.exit(main())
