"""`python -m mnif`, which is also what `accelerate launch -m mnif` runs."""

import sys

from mnif.cli import main

if __name__ == "__main__":
    sys.exit(main())
