"""Train from a checkout: `python scripts/train.py configs/sft/arithmetic.yaml --flag`.

The same as `jaxpost train`; a launcher to copy when a cluster needs a file to start.
"""

import sys

from jaxpost.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["train"]
    sys.exit(main())
