"""Convert weights from a checkout: `python scripts/convert.py SOURCE DESTINATION`.

The same as `jaxpost convert`: sharded safetensors in Hugging Face layout, reloaded and
compared.
"""

import sys

from jaxpost.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["convert"]
    sys.exit(main())
