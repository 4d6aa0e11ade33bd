"""What the three presets must hold against the published choice and the nearest peer, as tables with bounds."""

from collections import defaultdict
from dataclasses import dataclass

PRESETS = ("psa_fast", "psa_cover", "psa_quality")


@dataclass(frozen=True)
class Bounds:
    """Largest allowed values of one preset; None is not asked for.

    Args:
        density: Density, as a share of the published one of the same heads; at most this.
        recorded: Mean error of recorded heads, as a ratio to the mean published error.
        fields_mean: Mean over fields A to H of the ratio to the published error.
        fields_max: Largest of these ratios.
        absolute_density: Whether `density` is the density itself.
    """

    density: float
    recorded: float
    fields_mean: float | None = None
    fields_max: float | None = None
    absolute_density: bool = False


BOUNDS = {
    "psa_fast": Bounds(0.5, 0.90, 0.5, 1.2),
    "psa_cover": Bounds(1.0, 0.48, 0.25, 0.8),
    "psa_quality": Bounds(0.20, 0.36, absolute_density=True),
}


def show_acceptance(lines: list[dict]) -> bool:
    """Print the tables; return whether every bound holds.

    Args:
        lines: One dict a head and method, with `group` (recorded, fields, other), `case`, `method`, `density` and
            `relative_l1`. A method "published" is there for every head, and "first order PRESET BLOCK" for every
            preset: exact top blocks, one mean for each other block and the value tilt, at the density of the preset.
    """
    groups = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        groups[line["group"]][line["method"]][line["case"]] = line
    held = []
    if "recorded" in groups:
        held += _show_recorded(groups["recorded"])
    if "fields" in groups:
        held += _show_fields("Fields A to H: ratio to the published error, head by head", groups["fields"], bound=True)
    if "other" in groups:
        _show_fields("Fields of other kinds: moving textures I, J; scattered kinds K, L", groups["other"], bound=False)
    for group, title in (("recorded", "recorded heads"), ("fields", "fields A to H"), ("other", "fields I to L")):
        if group in groups:
            held += _show_first_order(title, groups[group], bound=group != "other")
    print(f"\n{sum(held)} of {len(held)} bounds hold")
    return all(held)


def _show_recorded(methods: dict) -> list[bool]:
    published = methods["published"]
    error, worst, density = _error(published), _worst(published), _mean(published, "density")
    print(
        f"\nRecorded heads ({len(published)}); published: error {error:.3f}, worst {worst:.3f}, density {density:.3f}"
    )
    print(f"{'':14}density           ratio of mean errors   worst head")
    held = []
    for name in PRESETS:
        lines, bounds = methods[name], BOUNDS[name]
        limit = bounds.density if bounds.absolute_density else bounds.density * density
        mine = [
            (_mean(lines, "density"), limit + 5e-4),  # figures are rounded to three digits
            (_error(lines) / error, bounds.recorded),
            (_worst(lines), worst),
        ]
        held += [value <= limit for value, limit in mine]
        print(f"{name:14}" + "   ".join(f"{_judged(value, limit)}" for value, limit in mine))
    return held


def _show_fields(title: str, methods: dict, *, bound: bool) -> list[bool]:
    by_shape = defaultdict(list)
    for case in methods["published"]:
        by_shape[case.split(" ", 1)[1]].append(case)
    print(f"\n{title}")
    print(f"{'':36}density            mean ratio / largest ratio")
    print(f"{'':36}publ." + "".join(f"  {name[4:]:>7}" for name in PRESETS) + "".join(f"{n[4:]:>15}" for n in PRESETS))
    for shape, cases in by_shape.items():
        row = f"{shape:36}{_mean(methods['published'], 'density', cases):.3f}"
        row += "".join(f"    {_mean(methods[name], 'density', cases):.3f}" for name in PRESETS)
        print(
            row
            + "".join(
                f"    {_ratios(methods, name, cases)[0]:.3f}/{_ratios(methods, name, cases)[1]:.2f}" for name in PRESETS
            )
        )
    held = []
    for name in PRESETS:
        mean, largest = _ratios(methods, name, list(methods["published"]))
        bounds = BOUNDS[name]
        if bound and bounds.fields_mean:
            held += [mean <= bounds.fields_mean, largest <= bounds.fields_max]
            print(f"{name}: mean {_judged(mean, bounds.fields_mean)}, largest {_judged(largest, bounds.fields_max)}")
        else:
            print(f"{name}: mean {mean:.3f}, largest {largest:.3f}")
    return held


def _show_first_order(title: str, methods: dict, *, bound: bool) -> list[bool]:
    print(f"\nAgainst exact top blocks, block means and value tilt at the density of the preset, {title}: mean error")
    held = []
    for name in PRESETS:
        mine, row = (
            _error(methods[name]),
            f"{name:14}{_error(methods[name]):.4f} at {_mean(methods[name], 'density'):.3f}",
        )
        for block in (64, 128):
            theirs = methods[f"first order {name} {block}"]
            row += f"   blocks of {block}: {_error(theirs):.4f} at {_mean(theirs, 'density'):.3f}"
            if bound:
                held.append(mine <= _error(theirs))
                row += " " if held[-1] else " MISSED"
        print(row)
    return held


def _ratios(methods: dict, name: str, cases: list[str]) -> tuple[float, float]:
    ratios = [methods[name][case]["relative_l1"] / methods["published"][case]["relative_l1"] for case in cases]
    return sum(ratios) / len(ratios), max(ratios)


def _mean(lines: dict, key: str, cases: list[str] | None = None) -> float:
    cases = list(lines) if cases is None else cases
    return sum(lines[case][key] for case in cases) / len(cases)


def _error(lines: dict) -> float:
    return _mean(lines, "relative_l1")


def _worst(lines: dict) -> float:
    return max(line["relative_l1"] for line in lines.values())


def _judged(value: float, limit: float) -> str:
    return f"{value:.3f} (<= {limit:.3f}{'' if value <= limit else ', MISSED'})"
