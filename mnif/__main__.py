"""`python -m mnif`, which is also what `torchrun -m -- mnif` runs."""

import sys

from mnif.cli import main

if __name__ == "__main__":
    sys.exit(main())
