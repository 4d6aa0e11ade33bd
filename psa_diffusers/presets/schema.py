"""What the user chose: schema of `configs/attention_config.yaml`, and the way from a name to a frozen object."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from psa_diffusers.presets.files import (
    build,
    builtin_file,
    file_version,
    find_name,
    merge,
    nest,
    parse_overrides,
    read_file,
    reject_unknown,
    suggest,
)
from psa_diffusers.presets.ranges import check_ranges, in_ranges

__all__ = [
    "KEY_VARIANCE_CAP",
    "BlockSize",
    "PSAPreset",
    "Section",
    "SimThresholds",
    "VideoScale",
    "list_presets",
    "load_preset",
    "load_section",
    "parse_mask_ratios",
    "parse_overrides",
    "preset_of_key",
]

logger = logging.getLogger("psa_diffusers")

KEY_VARIANCE_CAP = 4.0
"""Upper bound of the key-variance term of a logit: one far outlier in a cell must not take over the whole row."""

FACTORS = (0, 1, 2, 4, 8, 16, 32, 64, 128)
TYPES = ("psa", "dense")
REARRANGE_METHODS = ("Gilbert", "tiles", "boxes")
MASK_MODES = ("thresholdbound", "topk")
IMPORTANCE_METHODS = ("pooled_mass", "pooled_moments", "sampled_max")
TILT_GAINS = ("full", "sampled")

# 10 % of the key blocks in full, 5 % at half, 20 % at an eighth of their keys, the others skipped: density 0.15
_DEFAULT_RATIOS = ((1, 0.10), (2, 0.15), (8, 0.35), (0, 1.0))
_TOUCHING = 1e-6
_SMALLEST_BLOCK = 32  # keys; smaller ones cost more in planning than they save


@dataclass(frozen=True)
class BlockSize:
    """Sizes in tokens: `m` queries a block, `n` keys a block, `tile_n` pooled keys an iteration of the kernel."""

    m: int = 128
    n: int = 128
    tile_n: int = 32

    def __post_init__(self) -> None:
        for name, largest in (("m", 256), ("n", 256), ("tile_n", 128)):
            size = getattr(self, name)
            if not _is_int(size) or not 16 <= size <= largest or size & (size - 1):
                raise ValueError(f"block_size.{name} must be a power of two from 16 to {largest}, got {size!r}")


@dataclass(frozen=True)
class SimThresholds:
    """`xh`: mean cosine of the ends of cells of `h` keys above which `use_sim_mask` lets a block be pooled by `h`."""

    x2: float = 0.7
    x4: float = 0.65
    x8: float = 0.6

    def __post_init__(self) -> None:
        for name, cosine in asdict(self).items():
            if not _is_real(cosine) or not -1 <= cosine <= 1:
                raise ValueError(f"sim_thresholds.{name} is a cosine and must lie in [-1, 1], got {cosine!r}")


@dataclass(frozen=True)
class VideoScale:
    """Pixels and frames a token stands for. Documentation of the model: the grid is always read from what runs."""

    width_divisor: int = 16
    height_divisor: int = 16
    depth_divisor: int = 4


@dataclass(frozen=True)
class PSAPreset:
    """One preset: all that PSA may decide about a self-attention. Every field and default is here and nowhere else.

    The fields are the keys of the YAML. The object is frozen, hashable and picklable; change it with `replace`. Its
    attribute `key` is the whole of it as one string.

    Args:
        name: Name of the preset; in a file, the key it stands under.
        model: Section of the file it came from, empty if made by hand.
        type: `psa` (sparse) or `dense` (plain attention; the other fields mean nothing).
        description: One line for people.
        use_rearrange: Walk the video tokens in the order of `rearrange_method` before cutting them into blocks.
        rearrange_method: `Gilbert` (space-filling curve), `tiles` (boxes of `tile_size`) or `boxes`.
        block_size: Tokens of a query block, of a key block, and keys of a tile.
        mask_ratios: Factor to interval, `{1: [0, .1], 2: [.1, .15], 0: [.15, 1]}`: which part of the key blocks, from
            the most to the least important, is read at which pooling factor; 0 is skipped. Stored as `levels`.
        mask_mode: What the intervals count: `topk` blocks, `thresholdbound` accumulated importance.
        warmup_steps: Denoising steps at the start that run dense.
        dense_last_steps: Denoising steps at the end that run dense.
        steps: Other settings for some denoising steps: a range (`0:5`, `10%:50%`, `-1`) to the keys that differ there.
            Where ranges overlap, the later one wins. `layers` and `dense_layers` may stand among the keys: settings of
            some layers in these steps. Read them with `at`.
        layers: The same for some layers (blocks of the denoiser, from 0).
        dense_layers: Layers that run dense, `"0,1,-1"`.
        use_sim_mask: Pool a block no further than the likeness of neighbouring keys allows.
        sim_thresholds: How alike they must be.
        tile_size: Frames, rows and columns of a box, in tokens, for the order `tiles`.
        text_length: Text tokens; None reads it from what runs.
        verbose: Log at INFO instead of DEBUG what was enabled.
        attn_impl: Choice of a kernel in the original project. Accepted and ignored: there is one kernel.
        importance: Estimator: `pooled_mass` (cheap), `pooled_moments` (the same with the variance of the scores within
            a key cell; as cheap) or `sampled_max` (of the paper).
        key_variance: Correct the logit of a pooled cell for the spread of its keys.
        value_tilt: Correct the output for the covariance of keys and values inside the cells.
        tilt_gain: How much of the tilt: `full`, or `sampled`, a number from 0 to 1 fitted to each head.
        min_full_ratio: Smallest share of key blocks at factor 1 in `thresholdbound`.
        refresh_every: Denoising steps for which one level map is used; 1 makes one in every step. Compiled code always
            does; what else does, and the memory it takes, is in docs/developer/concept.md.
        min_blocks: A video of fewer key blocks gets smaller blocks, see `for_video`. 0 leaves the size alone.

    Raises:
        ValueError: If a value is out of range. The message names the key.
    """

    name: str = "custom"
    model: str = ""
    type: str = "psa"
    description: str = ""
    use_rearrange: bool = True
    rearrange_method: str = "Gilbert"
    block_size: BlockSize = field(default_factory=BlockSize)
    mask_ratios: Any = None
    mask_mode: str = "topk"
    warmup_steps: int = 0
    dense_last_steps: int = 0
    steps: Any = None
    layers: Any = None
    dense_layers: Any = None
    use_sim_mask: bool = False
    sim_thresholds: SimThresholds = field(default_factory=SimThresholds)
    tile_size: tuple[int, ...] = (2, 8, 8)
    text_length: int | None = None
    verbose: bool = False
    attn_impl: str | None = None
    importance: str = "pooled_mass"
    key_variance: bool = False
    value_tilt: bool = False
    tilt_gain: str = "full"
    min_full_ratio: float = 0.06
    refresh_every: int = 1
    min_blocks: int = 0

    def __post_init__(self) -> None:
        for key, choices in (
            ("type", TYPES),
            ("rearrange_method", REARRANGE_METHODS),
            ("mask_mode", MASK_MODES),
            ("importance", IMPORTANCE_METHODS),
            ("tilt_gain", TILT_GAINS),
        ):
            value = getattr(self, key)
            if value not in choices:
                raise ValueError(
                    f"{key} must be one of {', '.join(sorted(choices))}, got {value!r}.{suggest(value, choices)}"
                )
        for key in ("use_rearrange", "use_sim_mask", "verbose", "key_variance", "value_tilt"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"{key} must be true or false, got {getattr(self, key)!r}")
        for key, least in (("warmup_steps", 0), ("dense_last_steps", 0), ("refresh_every", 1), ("min_blocks", 0)):
            value = getattr(self, key)
            if not _is_int(value) or value < least:
                raise ValueError(f"{key} must be an integer of at least {least}, got {value!r}")
        if self.text_length is not None and (not _is_int(self.text_length) or self.text_length < 0):
            raise ValueError(f"text_length must be null or an integer of at least 0, got {self.text_length!r}")
        if not _is_real(self.min_full_ratio) or not 0 <= self.min_full_ratio <= 1:
            raise ValueError(f"min_full_ratio is a share and must lie in [0, 1], got {self.min_full_ratio!r}")

        store = object.__setattr__  # the normal forms of what was given; the dataclass is frozen
        store(self, "block_size", _as_part(BlockSize, self.block_size, "block_size"))
        store(self, "sim_thresholds", _as_part(SimThresholds, self.sim_thresholds, "sim_thresholds"))
        size = self.tile_size
        if not _is_list(size) or len(size) != 3 or not all(_is_int(edge) and edge > 0 for edge in size):
            raise ValueError(f"tile_size must be three positive integers (frames, rows, columns), got {size!r}")
        store(self, "tile_size", tuple(size))

        ratios = self.mask_ratios
        if ratios is None:
            ratios = ((1, 1.0),) if self.type == "dense" else _DEFAULT_RATIOS
        store(self, "mask_ratios", parse_mask_ratios(ratios))
        coarsest = max(factor for factor, _ in self.mask_ratios)
        if coarsest > self.block_n:
            raise ValueError(
                f"mask_ratios uses factor {coarsest}, but a block of block_size.n={self.block_n} keys cannot be pooled "
                f"by more than {self.block_n}; raise block_size.n or drop the factor"
            )
        if self.attn_impl is not None:
            _warn_attn_impl()
            store(self, "attn_impl", None)
        store(self, "dense_layers", None if self.dense_layers is None else check_ranges(self.dense_layers))
        for key in ("steps", "layers"):
            store(self, key, _as_exceptions(key, getattr(self, key)))
        for values in {values for _, values in (*self.steps, *self.layers)}:
            for part in _split(values):  # a wrong key or value must not wait for its step
                self._changed(part.values)
        # what the operator, whose arguments are numbers and strings, gets of this object; `preset_of_key` reads it
        store(self, "key", json.dumps(asdict(self)))

    @property
    def block_m(self) -> int:
        """Queries in a block."""
        return self.block_size.m

    @property
    def block_n(self) -> int:
        """Keys in a block."""
        return self.block_size.n

    @property
    def levels(self) -> tuple[tuple[int, float], ...]:
        """`(factor, upper bound)` of the non-empty intervals, most important first: `((1, .1), (2, .15), (0, 1.))`."""
        return self.mask_ratios

    @property
    def factors(self) -> tuple[int, ...]:
        """Pooling factors that a level map of this preset can contain, ascending, always with 1 and never with 0.

        `use_sim_mask` lowers a block to any factor below its own, so it adds every power of two below the largest.
        """
        pooled = {1} | {factor for factor, _ in self.levels if factor}
        if self.use_sim_mask:
            pooled |= {factor for factor in FACTORS if 0 < factor < max(pooled)}
        return tuple(sorted(pooled))

    @property
    def order(self) -> str:
        """Order of the video tokens: `raster`, `gilbert`, `tiles` or `boxes`."""
        return self.rearrange_method.lower() if self.use_rearrange else "raster"

    def at(
        self, step: int = 0, num_steps: int | None = None, layer: int = 0, num_layers: int | None = None
    ) -> PSAPreset:
        """Return the settings of one layer in one denoising step.

        `steps` wins over `layers`; the `layers` and `dense_layers` inside a range of steps win over its other keys.

        Args:
            step: Denoising step, from 0.
            num_steps: Steps of the run; None if unknown. Then shares and negative indices match nothing.
            layer: Layer, from 0.
            num_layers: Layers of the denoiser, likewise.
        """
        if not (self.steps or self.layers or self.dense_layers):
            return self
        changes = [values for where, values in self.layers if in_ranges(where, layer, num_layers)]
        if self.dense_layers and in_ranges(self.dense_layers, layer, num_layers):
            changes.append('{"type": "dense"}')
        for values in (values for where, values in self.steps if in_ranges(where, step, num_steps)):
            changes += [part.values for part in _split(values) if in_ranges(part.layers, layer, num_layers)]
        return self._changed(*changes)

    @lru_cache(maxsize=256)  # noqa: B019 - presets are few, small and hashable
    def for_video(self, tokens: int) -> PSAPreset:
        """Return the preset for a video of so many tokens: with smaller blocks if it has fewer than `min_blocks`.

        Blocks of queries and keys are halved until there are enough key blocks, but keys not below 32 tokens. Factors
        above the new size become that size; in `topk` the finer shares shrink as much as keeps the density.
        """
        m, n = self.block_m, self.block_n
        while -(-tokens // n) < self.min_blocks and n > _SMALLEST_BLOCK:
            m, n = max(m // 2, 16), n // 2
        if n == self.block_n:
            return self
        ratios = _coarsest(self.levels, n, keep_density=self.mask_mode == "topk")
        return self.replace(block_size={"m": m, "n": n}, mask_ratios=ratios)

    @lru_cache(maxsize=4096)  # noqa: B019 - presets are few, small and hashable
    def _changed(self, *changes: str) -> PSAPreset:
        plain = replace(self, steps=None, layers=None, dense_layers=None)
        for values in changes:
            plain = plain.replace(**json.loads(values))
        return plain

    def replace(self, **overrides: Any) -> PSAPreset:
        """Return a copy with some fields changed, checked again.

        Args:
            **overrides: Fields by their YAML names. A mapping for `block_size` or `sim_thresholds` changes only the
                keys it holds; `mask_ratios` is replaced as a whole.

        Raises:
            ValueError: If a key is unknown or a value is not allowed.
        """
        where = f"preset {self.name!r}"
        changes = nest({key: asdict(value) if isinstance(value, _PARTS) else value for key, value in overrides.items()})
        _reject_unknown_keys(changes, where, allowed=_FIELDS)
        return build(PSAPreset, merge(asdict(self), changes, whole=("mask_ratios",)), where)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values by their YAML names, `mask_ratios` as the mapping; fit for JSON and YAML."""
        values = asdict(self)
        intervals, start = {}, 0.0
        for factor, end in self.levels:
            intervals[factor] = [start, end]
            start = end
        for key in ("steps", "layers"):
            values[key] = {where: json.loads(changes) for where, changes in getattr(self, key)} or None
        return {**values, "mask_ratios": intervals, "tile_size": list(self.tile_size)}


@dataclass(frozen=True)
class Section:
    """What a file knows of one model.

    Args:
        model: Name of the section.
        default_attention: Preset that is used when none is asked for.
        video_scale: Pixels and frames a token stands for.
        text_length: Text tokens the model was published with, None if the file does not say. Information only.
        presets: Preset by name; `baseline` is always there.
    """

    model: str
    default_attention: str
    video_scale: VideoScale
    text_length: int | None
    presets: dict[str, PSAPreset] = field(hash=False)


@dataclass
class _SectionValues:
    """Types of the keys of a section apart from its presets."""

    default_attention: str | None = None
    video_scale: VideoScale = field(default_factory=VideoScale)
    text_length: int | None = None


_PARTS = (BlockSize, SimThresholds)
_FIELDS = frozenset(spec.name for spec in fields(PSAPreset))
_PRESET_KEYS = _FIELDS - {"name", "model"}  # these two are the place in the file
# keys of a whole run: they cannot differ between steps or layers
_ONCE = frozenset({"steps", "layers", "dense_layers", "warmup_steps", "dense_last_steps", "refresh_every"})
_SECTION_KEYS = frozenset(spec.name for spec in fields(_SectionValues)) | {"attention_configs"}
_CONFIG_FILE = "attention_config.yaml"


def parse_mask_ratios(
    ratios: Mapping[int | str, Sequence[float]] | Sequence[Sequence[float]],
) -> tuple[tuple[int, float], ...]:
    """Check the intervals of `mask_ratios` and bring them into the order of importance.

    Args:
        ratios: Factor to `[start, end]` in any order, a missing factor being an empty interval; or what this returns.

    Returns:
        `(factor, end)` of every non-empty interval, the most important first. Each starts where the one before ends.

    Raises:
        ValueError: If a factor is unknown, an interval is no pair within [0, 1], the intervals do not cover [0, 1]
            without gap and overlap, or a finer factor follows a coarser one (0, skip, is the coarsest).
    """
    if isinstance(ratios, Mapping):
        intervals = [(_as_factor(factor), *_as_interval(factor, interval)) for factor, interval in ratios.items()]
    else:
        intervals, start = [], 0.0
        for pair in ratios if _is_list(ratios) else [ratios]:
            if not _is_list(pair) or len(pair) != 2:
                raise ValueError(
                    f"mask_ratios must map a factor to [start, end], for example 1: [0.0, 0.1]; got {pair!r}"
                )
            intervals.append((_as_factor(pair[0]), *_as_interval(pair[0], (start, pair[1]))))
            start = intervals[-1][2]
    if len({factor for factor, _, _ in intervals}) < len(intervals):
        raise ValueError(f"mask_ratios names a factor twice: {ratios!r}; give each factor one interval")

    filled = sorted((start, end, factor) for factor, start, end in intervals if end - start > _TOUCHING)
    shown = ", ".join(f"{factor}: [{start:g}, {end:g}]" for start, end, factor in filled) or "nothing"
    reached = 0.0
    for start, end, factor in filled:
        if abs(start - reached) > _TOUCHING:
            problem = "leave a gap before" if start > reached else "overlap at"
            raise ValueError(
                f"mask_ratios must start at 0, touch, and end at 1; the intervals {problem} factor {factor}, which "
                f"starts at {start:g} where {reached:g} was due: {shown}"
            )
        reached = end
    if abs(reached - 1.0) > _TOUCHING:
        raise ValueError(
            f"mask_ratios must end at 1, but the intervals end at {reached:g}; add 0: [{reached:g}, 1.0]: {shown}"
        )

    by_importance = [factor for _, _, factor in filled]
    if by_importance != sorted(by_importance, key=lambda factor: factor or math.inf):
        raise ValueError(f"mask_ratios must get coarser as importance falls, 1 first and 0 last; got {shown}")
    levels = [(factor, float(end)) for _, end, factor in filled]
    return (*levels[:-1], (levels[-1][0], 1.0))


def load_preset(
    model: str, name: str | None = None, *, config: str | Path | None = None, **overrides: Any
) -> PSAPreset:
    """Return a preset of a model.

    Args:
        model: Name of a section of the file, upper and lower case being the same. `default` serves models nobody knows.
        name: Name of a preset of that section; None takes the section's `default_attention`.
        config: Path of a YAML of your own. Its sections and presets are laid over the built-in file: it needs to hold
            only what is new or different.
        **overrides: Changes by the names of the YAML, `warmup_steps=0` or `block_size={"m": 64}`; dotted names work as
            well, `**{"block_size.m": 64}`. `mask_ratios` is replaced as a whole.

    Raises:
        FileNotFoundError: If `config` does not exist.
        ValueError: If the section, the preset, a key or a value is not valid. The message lists what exists.
    """
    if overrides:
        return _load_preset(model, name, config, nest(overrides))
    # a call of psa_attention with a name comes here once a layer: 8 ms without the cache
    version = file_version(config) if config is not None else None
    return _load_preset_version(model, name, file_version(builtin_file(_CONFIG_FILE)), version)


@lru_cache(maxsize=256)
def _load_preset_version(
    model: str, name: str | None, builtin: tuple[Path, int], config: tuple[Path, int] | None
) -> PSAPreset:
    return _load_preset(model, name, config[0] if config else None, {})


def _load_preset(model: str, name: str | None, config: str | Path | None, overrides: Mapping[str, Any]) -> PSAPreset:
    sections = _sections(config)
    model = find_name(model, sections, "model section")
    presets = _presets_of(sections[model], model)
    if name is None:
        name = _default_attention(sections[model], model)
    if name not in presets:
        elsewhere = [section for section, values in sections.items() if name in _presets_of(values, section)]
        hint = f" It exists in {', '.join(elsewhere)}." if elsewhere else suggest(name, presets)
        raise ValueError(
            f"model section {model!r} has no preset {name!r}.{hint} Available: {', '.join(sorted(presets))}"
        )
    return _make_preset(model, name, presets[name], overrides)


def load_section(model: str, config: str | Path | None = None) -> Section:
    """Return everything a file says about a model; arguments and errors as in `load_preset`."""
    sections = _sections(config)
    model = find_name(model, sections, "model section")
    values = sections[model]
    described = {key: value for key, value in values.items() if key != "attention_configs"}
    typed = build(_SectionValues, described, f"section {model!r}")
    presets = {name: _make_preset(model, name, preset) for name, preset in _presets_of(values, model).items()}
    default = _default_attention(values, model)
    return Section(model, default, typed.video_scale, typed.text_length, presets)


@lru_cache(maxsize=4096)
def preset_of_key(key: str) -> PSAPreset:
    """Return the preset whose `key` this is. Nothing needs to have been remembered, in this process or another."""
    return PSAPreset(**json.loads(key))


def list_presets(model: str | None = None, *, config: str | Path | None = None) -> list[str] | dict[str, list[str]]:
    """Return the names of a model's presets; without a model, a dict of section name to preset names.

    Raises:
        ValueError: If there is no such section.
    """
    sections = _sections(config)
    if model is None:
        return {section: list(_presets_of(values, section)) for section, values in sections.items()}
    model = find_name(model, sections, "model section")
    return list(_presets_of(sections[model], model))


def _sections(config: str | Path | None) -> dict[str, dict[str, Any]]:
    """Section name to raw values: the built-in file with the user's laid over it. Unknown keys are errors."""
    sections = _checked_sections(builtin_file(_CONFIG_FILE))
    if config is None:
        return sections
    known = {name.casefold(): name for name in sections}
    own = {known.get(name.casefold(), name): values for name, values in _checked_sections(config).items()}
    return merge(sections, own, whole=("mask_ratios",))


def _checked_sections(path: str | Path) -> dict[str, dict[str, Any]]:
    sections = read_file(path)
    for section, values in sections.items():
        where = f"{Path(path).name}: section {section!r}"
        if not isinstance(section, str) or not isinstance(values, dict):
            raise ValueError(
                f"{where} must be a name with a mapping of {', '.join(sorted(_SECTION_KEYS))}, got {values!r}"
            )
        reject_unknown(values, _SECTION_KEYS, where)
        reject_unknown(_mapping(values, "video_scale", where), asdict(VideoScale()), f"{where}, video_scale")
        for name, preset in _mapping(values, "attention_configs", where).items():
            if not isinstance(preset, dict):
                raise ValueError(f"{where}: preset {name!r} must be a mapping of keys, got {preset!r}")
            _reject_unknown_keys(preset, f"{where}, preset {name!r}")
    folded = [section.casefold() for section in sections]
    if len(set(folded)) < len(folded):
        raise ValueError(
            f"{Path(path).name}: two sections differ only in upper and lower case: {', '.join(sorted(sections))}"
        )
    return sections


def _reject_unknown_keys(preset: Mapping[str, Any], where: str, allowed: frozenset[str] = _PRESET_KEYS) -> None:
    reject_unknown(preset, allowed, where)
    for key, part in (("block_size", BlockSize), ("sim_thresholds", SimThresholds)):
        if key in preset and not isinstance(preset[key], Mapping):
            raise ValueError(f"{where}: {key} must be a mapping of {', '.join(asdict(part()))}, got {preset[key]!r}")
        reject_unknown(preset.get(key, ()), asdict(part()), f"{where}, {key}")


def _mapping(values: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = values.get(key) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: {key} must be a mapping, got {value!r}")
    return value


def _presets_of(section: Mapping[str, Any], model: str) -> dict[str, dict[str, Any]]:
    presets = {
        str(name): preset for name, preset in _mapping(section, "attention_configs", f"section {model!r}").items()
    }
    return {"baseline": {"type": "dense", "description": "Dense attention."}, **presets}


def _default_attention(section: Mapping[str, Any], model: str) -> str:
    """The preset to use when none is asked for; a section that does not say gets its first sparse one."""
    presets = _presets_of(section, model)
    default = section.get("default_attention")
    if default is None:
        sparse = [name for name, preset in presets.items() if preset.get("type") != "dense"]
        return (sparse or list(presets))[0]
    if default not in presets:
        raise ValueError(
            f"section {model!r}: default_attention is {default!r}, which is none of its presets."
            f"{suggest(default, presets)} Available: {', '.join(sorted(presets))}"
        )
    return default


def _make_preset(
    model: str, name: str, values: Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> PSAPreset:
    where = f"preset {name!r} of {model!r}"
    overrides = {key: asdict(value) if isinstance(value, _PARTS) else value for key, value in (overrides or {}).items()}
    _reject_unknown_keys(overrides, where)
    merged = merge(values, overrides, whole=("mask_ratios",))
    return build(PSAPreset, {**merged, "name": name, "model": model}, where)


def _as_factor(factor: int | str) -> int:
    # command lines and JSON give "8"
    number = int(factor) if isinstance(factor, str) and factor.isdigit() else factor
    if not _is_int(number) or number not in FACTORS:
        raise ValueError(
            f"mask_ratios: unknown factor {factor!r}.{suggest(factor, FACTORS)} "
            f"Available: {', '.join(map(str, FACTORS))} (0 is skip)"
        )
    return number


def _as_interval(factor: int | str, interval: Sequence[float]) -> tuple[float, float]:
    pair = _is_list(interval) and len(interval) == 2
    if not pair or not all(_is_real(bound) for bound in interval) or not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(
            f"mask_ratios: factor {factor} needs [start, end] with 0 <= start <= end <= 1, got {interval!r}"
        )
    return float(interval[0]), float(interval[1])


def _coarsest(
    levels: tuple[tuple[int, float], ...], largest: int, *, keep_density: bool
) -> tuple[tuple[int, float], ...]:
    """Levels without factors above the largest; what those read costs more, so the finer shares shrink by one ratio."""
    starts = (0.0, *(end for _, end in levels[:-1]))
    shares = {}
    for (factor, end), start in zip(levels, starts, strict=True):
        shares[min(factor, largest)] = shares.get(min(factor, largest), 0.0) + end - start
    finer = {factor: share for factor, share in shares.items() if 0 < factor < largest}
    if keep_density and finer and largest in shares:
        density = sum((end - start) / factor for (factor, end), start in zip(levels, starts, strict=True) if factor)
        read = sum(finer.values()) + shares[largest]
        cost = sum(share / factor for factor, share in finer.items())
        ratio = (density - read / largest) / (cost - sum(finer.values()) / largest)
        finer = {factor: share * min(max(ratio, 0.0), 1.0) for factor, share in finer.items()}
        shares |= {**finer, largest: read - sum(finer.values())}
    ends, reached = [], 0.0
    for factor in sorted(shares, key=lambda factor: factor or math.inf):
        if shares[factor] > 0:
            reached += shares[factor]
            ends.append((factor, min(reached, 1.0)))
    return (*ends[:-1], (ends[-1][0], 1.0))


def _as_exceptions(key: str, given: Any) -> tuple[tuple[str, str], ...]:
    """Range and changed keys as JSON, pair by pair: hashable, and in the order of the file."""
    if given is None:
        return ()
    pairs = given.items() if isinstance(given, Mapping) else given
    stored = []
    for where, values in pairs:
        values = json.loads(values) if isinstance(values, str) else values
        if not isinstance(values, Mapping):
            raise ValueError(f"{key}: range {where!r} must map to the keys that differ there, got {values!r}")
        allowed = _PRESET_KEYS - _ONCE | ({"layers", "dense_layers"} if key == "steps" else set())
        try:
            _reject_unknown_keys(values, f"range {where!r}", allowed)
            if values.get("dense_layers") is not None:
                check_ranges(values["dense_layers"])
            if "layers" in values:
                within = dict(_as_exceptions("layers", values["layers"]))
                values = {**values, "layers": {layers: json.loads(changes) for layers, changes in within.items()}}
            stored.append((check_ranges(where), json.dumps(values)))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    return tuple(stored)


@dataclass(frozen=True)
class _Part:
    """Changed keys as JSON, and the layers they are for."""

    layers: str
    values: str


@lru_cache(maxsize=4096)
def _split(values: str) -> tuple[_Part, ...]:
    """Changes of a range of steps by the layers they are for: all layers first, then some, then the dense ones."""
    plain = json.loads(values)
    within, dense = plain.pop("layers", None) or {}, plain.pop("dense_layers", None)
    parts = [_Part(":", json.dumps(plain))] if plain else []
    parts += [_Part(layers, json.dumps(changes)) for layers, changes in within.items()]
    if dense is not None:
        parts.append(_Part(check_ranges(dense), '{"type": "dense"}'))
    return tuple(parts)


def _as_part(part: type, value: Any, key: str) -> Any:
    if isinstance(value, part):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"{key} must be a mapping of {', '.join(asdict(part()))}, got {value!r}")
    reject_unknown(value, asdict(part()), key)
    return replace(part(), **value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@lru_cache(maxsize=1)
def _warn_attn_impl() -> None:
    """Say it once a process: the cache remembers that it was said."""
    logger.warning("attn_impl is ignored: psa_diffusers has one kernel; remove the key from your config")
