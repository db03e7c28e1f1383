"""`python -m skylapse` is the command `skylapse`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
