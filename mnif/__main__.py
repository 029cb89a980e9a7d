"""`python -m mnif`, which is also what `torchrun -m -- mnif` runs."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts the working folder first, where there may be an export.py or a torch.py of the user's.
    if not sys.flags.safe_path and Path(sys.path[0]).resolve() != Path(__file__).resolve().parents[1]:
        del sys.path[0]

    from mnif.cli import main

    sys.exit(main())
