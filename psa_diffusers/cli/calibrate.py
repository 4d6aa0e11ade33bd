"""Write a preset that meets a target error or density on a model: psa_diffusers.calibrate from the command line.

    python scripts/calibrate.py --model demo --target_error 0.1 --path calibrated.yaml
    python scripts/calibrate.py --model cogvideo_5b --target_density 0.12 --prompt_file prompts.txt --path mine.yaml

The last quarter of the prompts (at least one) is held out: the finished preset is checked on it. What was measured
stands beside the preset; another target with the same --path needs no new measurement, and an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from psa_diffusers.calibration import calibrate
from psa_diffusers.calibration.places import check_place
from psa_diffusers.calibration.target import check_request
from psa_diffusers.cli.opening import add_call_options, open_model, read_prompts

__all__ = ["main", "parse"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        The exit status: 0, 2 after a message about what was asked for or cannot be, 130 after an interruption.
    """
    args = parse(argv)
    targets = {"target_error": args.target_error, "target_density": args.target_density}
    own = {"path": args.path, "name": args.name, "parts": args.parts, "max_heads": args.max_heads, "seed": args.seed}
    try:
        # before the model is loaded, which takes minutes
        check_request(**targets, **own)
        if args.json:
            check_place(args.json)
        prompts = read_prompts(args, args.model)
        pipe, call = open_model(args.model, args)
        found = calibrate(pipe, prompts, preset=args.preset, **targets, **own, **call)
        print(found.summary())
        if args.json:
            line = {"model": args.model, **asdict(found), "path": found.path.name}
            with args.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on with what was measured", file=sys.stderr)
        return 130
    return 0


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="entry of configs/models.yaml, folder or hub id")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--target_error", type=float, help="mean relative L1 error of the attention output")
    target.add_argument("--target_density", type=float, help="mean density")
    parser.add_argument("--path", type=Path, required=True, help="the YAML to write")
    parser.add_argument("--name", default="calibrated", help="name of the preset (default: calibrated)")
    parser.add_argument("--preset", help="preset whose shares are varied (default: psa_cover)")
    parser.add_argument(
        "--parts", type=int, default=4, help="parts of the run with densities of their own (default: 4)"
    )
    parser.add_argument("--max_heads", type=int, default=8, help="heads measured in a call (default: 8)")
    parser.add_argument("--json", type=Path, help="append what was found here, as one JSON line")
    add_call_options(parser)
    return parser.parse_args(argv)
