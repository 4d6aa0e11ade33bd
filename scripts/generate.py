"""Generate videos, dense or with pyramid sparse attention: `python scripts/generate.py --help` shows how."""

import sys

from psa_diffusers.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
