"""Choices of levels that are judged: presets, the published choice, and the peers at the same densities."""

from dataclasses import dataclass

from psa_diffusers import PSAPreset, list_presets, load_preset
from psa_diffusers.calibration.ladder import ladder_ratios
from psa_diffusers.cli.published import published_choice

from .acceptance import PRESETS


@dataclass(frozen=True)
class Method:
    """A row of the table, or a point of a line in the picture.

    Args:
        line: Name of the line in the picture.
        preset: What to run.
        published_estimator: Whether importance comes from random positions that all blocks share, as published.
    """

    line: str
    preset: PSAPreset
    published_estimator: bool = False

    @property
    def name(self) -> str:
        return self.preset.name


def choose_methods(args) -> list[Method]:
    """The presets that were asked for, and the baselines."""
    known = list_presets(args.model, config=args.config) if args.config else list_presets(args.model)
    names = args.presets or [name for name in known if load_preset(args.model, name, config=args.config).type == "psa"]
    presets = [load_preset(args.model, name, config=args.config) for name in names]
    methods = [Method(preset.name, preset) for preset in presets]
    methods.append(Method("dense", PSAPreset(type="dense", name="dense")))
    ours = load_preset(args.model, "psa_cover", config=args.config)
    for density in args.densities:
        ratios = ladder_ratios(density, ours.block_n)
        methods.append(Method("this project", ours.replace(name=label("this project", density), mask_ratios=ratios)))
        published = published_choice(density, name=label("published", density))
        methods.append(Method("published", published, published_estimator=True))
        for block in (64, 128):
            coarse = {"rearrange_method": args.baseline_order, "block_size": {"m": block, "n": block}}
            exact = (density - 1 / block) / (1 - 1 / block)
            covered = PSAPreset(mask_ratios=((1, exact), (block, 1.0)), **coarse)
            for order, tilt in (("zeroth", False), ("first", True)):
                name = f"top + mean, {order} order, {block}"
                methods.append(Method(name, covered.replace(name=label(name, density), value_tilt=tilt)))
        dropping = PSAPreset(name=label("top, rest dropped", density), mask_ratios=((1, density), (0, 1.0)))
        dropping = dropping.replace(rearrange_method=args.baseline_order)
        methods.append(Method("top, rest dropped", dropping))
    return methods


def acceptance_methods(args) -> list[Method]:
    """Our presets, the published choice, and the peer that comes nearest at the densities of our presets."""
    methods = [Method("published", published_choice(), published_estimator=True)]
    for name in PRESETS:
        preset = load_preset(args.model, name, config=args.config)
        methods.append(Method(name, preset))
        for block in (64, 128):
            exact = (_density(preset) - 1 / block) / (1 - 1 / block)
            peer = PSAPreset(
                name=f"first order {name} {block}",
                rearrange_method=args.baseline_order,
                block_size={"m": block, "n": block},
                mask_ratios=((1, exact), (block, 1.0)),
                value_tilt=True,
            )
            methods.append(Method("first order", peer))
    return methods


def _density(preset: PSAPreset) -> float:
    starts = (0.0, *(end for _, end in preset.levels))
    return sum((end - start) / f for (f, end), start in zip(preset.levels, starts, strict=False) if f)


def label(line: str, density: float) -> str:
    return f"{line} @{density:g}"
