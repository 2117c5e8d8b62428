"""`python -m ondevice_trgl` is `trgl-device`."""

import sys

from ondevice_trgl.cli import main

if __name__ == "__main__":
    sys.exit(main())
