"""`python -m skylapse.benchmarks NAME ...` is `skylapse bench NAME ...`."""

import sys

from ..runtime.core.config import load_settings
from .command import bench

if __name__ == "__main__":
    try:
        sys.exit(bench(sys.argv[1:], load_settings()))
    except (ValueError, FileNotFoundError) as mistake:  # the user's, as the command line has it
        print(f"skylapse: error: {mistake}", file=sys.stderr)
        sys.exit(2)
