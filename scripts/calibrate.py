"""Write a preset that meets a target on a model: `python scripts/calibrate.py --help` shows how."""

import sys

from psa_diffusers.cli.calibrate import main

if __name__ == "__main__":
    sys.exit(main())
