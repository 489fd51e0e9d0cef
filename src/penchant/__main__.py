"""`python -m penchant`: the command line; also what a launcher starts."""

import sys

from penchant.cli import main

if __name__ == "__main__":
    sys.exit(main())
