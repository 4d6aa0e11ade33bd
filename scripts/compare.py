"""Hold videos of several presets against dense attention: `python scripts/compare.py --help` shows how."""

import sys

from psa_diffusers.cli.compare import main

if __name__ == "__main__":
    sys.exit(main())
