import sys

from larpixdaq.emulators import main

if __name__ == "__main__":
    sys.exit(main())
