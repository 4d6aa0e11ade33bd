"""A preset: every decision that PSA takes about a self-attention, as one frozen object that checks itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import InitVar, asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any, TypeVar

from psa_diffusers.presets.changes import parse_changes, split
from psa_diffusers.presets.ignored import drop_ignored, ignore
from psa_diffusers.presets.plain import refuse_interpolation
from psa_diffusers.presets.ranges import check_ranges, in_ranges
from psa_diffusers.presets.ratios import DEFAULT_RATIOS, FACTORS, Levels, coarsen, parse_mask_ratios
from psa_diffusers.presets.values import Keys, build, is_int, is_list, is_real, suggest

_CHOICES = {
    "type": ("psa", "dense"),
    "rearrange_method": ("Gilbert", "tiles", "boxes"),
    "mask_mode": ("thresholdbound", "topk"),
    "importance": ("pooled_mass", "pooled_moments", "sampled_max"),
    "tilt_gain": ("full", "sampled"),
}
_SWITCHES = ("use_rearrange", "use_sim_mask", "key_variance", "value_tilt")
_LEAST = {"warmup_steps": 0, "dense_last_steps": 0, "refresh_every": 1, "min_blocks": 0}

_SMALLEST_BLOCK = 32  # keys; smaller ones cost more in planning than they save

Part = TypeVar("Part")


@dataclass(frozen=True)
class BlockSize:
    """Sizes in tokens: `m` queries a block, `n` keys a block. `tile_n` is ignored, see `PSAPreset`."""

    m: int = 128
    n: int = 128
    tile_n: InitVar[int | None] = None

    def __post_init__(self, tile_n: int | None) -> None:
        ignore("block_size.tile_n", tile_n)
        for name, size in asdict(self).items():
            if not is_int(size) or not 16 <= size <= 256 or size & (size - 1):
                raise ValueError(f"block_size.{name} must be a power of two from 16 to 256, got {size!r}")


@dataclass(frozen=True)
class SimThresholds:
    """`xh`: mean cosine of the ends of cells of `h` keys above which `use_sim_mask` lets a block be pooled by `h`."""

    x2: float = 0.7
    x4: float = 0.65
    x8: float = 0.6

    def __post_init__(self) -> None:
        for name, cosine in asdict(self).items():
            if not is_real(cosine) or not -1 <= cosine <= 1:
                raise ValueError(f"sim_thresholds.{name} is a cosine and must lie in [-1, 1], got {cosine!r}")


class _Keyed:
    # declared outside the dataclass, so that it is no field
    key: str
    """The whole of the preset as one string. `preset_of_key` makes the preset of it."""


@dataclass(frozen=True)
class PSAPreset(_Keyed):
    """One preset: all that PSA may decide about a self-attention. Every field and default is here and nowhere else.

    The fields are the keys of the YAML. The object is frozen, hashable and picklable; change it with `replace`. Its
    attribute `key` is the whole of it as one string.

    The keys `text_length`, `verbose`, `attn_impl` and `block_size.tile_n` of the original project are accepted and
    ignored: they are checked, named once in the log, and are no part of the preset, of its `key` or of `to_dict`. Text
    tokens are counted in the call that runs. The level of the logger `psa_diffusers` says what is logged. The kernels
    choose their tiles.

    Args:
        name: Name of the preset; in a file, the key it stands under.
        model: Section of the file it came from, empty if made by hand.
        type: `psa` (sparse) or `dense` (plain attention; the other fields mean nothing).
        description: One line for people.
        use_rearrange: Walk the video tokens in the order of `rearrange_method` before cutting them into blocks.
        rearrange_method: `Gilbert` (space-filling curve), `tiles` (boxes of `tile_size`) or `boxes`.
        block_size: Tokens of a query block, `m`, and of a key block, `n`.
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
        text_length: Ignored, as are the next two.
        verbose: Ignored.
        attn_impl: Ignored.
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
    text_length: InitVar[int | None] = None
    verbose: InitVar[bool | None] = None
    attn_impl: InitVar[str | None] = None
    importance: str = "pooled_mass"
    key_variance: bool = False
    value_tilt: bool = False
    tilt_gain: str = "full"
    min_full_ratio: float = 0.06
    refresh_every: int = 1
    min_blocks: int = 0

    def __post_init__(self, text_length: int | None, verbose: bool | None, attn_impl: str | None) -> None:
        for key, ignored in (("text_length", text_length), ("verbose", verbose), ("attn_impl", attn_impl)):
            ignore(key, ignored)
        self._check_plain_values()
        refuse_interpolation({key: getattr(self, key) for key in ("name", "model", "description")}, "preset")

        store = object.__setattr__  # the normal forms of what was given; the dataclass is frozen
        store(self, "block_size", _as_part(BlockSize, self.block_size, "block_size"))
        store(self, "sim_thresholds", _as_part(SimThresholds, self.sim_thresholds, "sim_thresholds"))
        store(self, "tile_size", tuple(self.tile_size))
        ratios = self.mask_ratios
        if ratios is None:
            ratios = ((1, 1.0),) if self.type == "dense" else DEFAULT_RATIOS
        store(self, "mask_ratios", parse_mask_ratios(ratios))
        coarsest = max(factor for factor, _ in self.levels)
        if coarsest > self.block_n:
            raise ValueError(
                f"mask_ratios uses factor {coarsest}, but a block of block_size.n={self.block_n} keys cannot be pooled "
                f"by more than {self.block_n}; raise block_size.n or drop the factor"
            )
        store(self, "dense_layers", None if self.dense_layers is None else check_ranges(self.dense_layers))
        for key in ("steps", "layers"):
            store(self, key, parse_changes(key, getattr(self, key), PRESET_KEYS))
        for values in {values for _, values in (*self.steps, *self.layers)}:
            for part in split(values):  # a wrong key or value must not wait for its step
                self._changed(part.values)
        # what the operator, whose arguments are numbers and strings, gets of this object
        store(self, "key", json.dumps(asdict(self)))

    def _check_plain_values(self) -> None:
        for key, choices in _CHOICES.items():
            value = getattr(self, key)
            if value not in choices:
                raise ValueError(
                    f"{key} must be one of {', '.join(sorted(choices))}, got {value!r}.{suggest(value, choices)}"
                )
        for key in _SWITCHES:
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"{key} must be true or false, got {getattr(self, key)!r}")
        for key, least in _LEAST.items():
            value = getattr(self, key)
            if not is_int(value) or value < least:
                raise ValueError(f"{key} must be an integer of at least {least}, got {value!r}")
        if not is_real(self.min_full_ratio) or not 0 <= self.min_full_ratio <= 1:
            raise ValueError(f"min_full_ratio is a share and must lie in [0, 1], got {self.min_full_ratio!r}")
        size = self.tile_size
        if not is_list(size) or len(size) != 3 or not all(is_int(edge) and edge > 0 for edge in size):
            raise ValueError(f"tile_size must be three positive integers (frames, rows, columns), got {size!r}")

    @property
    def block_m(self) -> int:
        """Queries in a block."""
        return self.block_size.m

    @property
    def block_n(self) -> int:
        """Keys in a block."""
        return self.block_size.n

    @property
    def levels(self) -> Levels:
        """`(factor, upper bound)` of the non-empty intervals, most important first: `((1, .1), (2, .15), (0, 1.))`."""
        levels: Levels = self.mask_ratios
        return levels

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
            changes += [part.values for part in split(values) if in_ranges(part.layers, layer, num_layers)]
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
        ratios = coarsen(self.levels, n, keep_density=self.mask_mode == "topk")
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
        return make_preset(asdict(self), overrides, f"preset {self.name!r}", PRESET_KEYS)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values by their YAML names, `mask_ratios` as the mapping; fit for JSON and YAML."""
        values = asdict(self)
        intervals: dict[int, list[float]] = {}
        start = 0.0
        for factor, end in self.levels:
            intervals[factor] = [start, end]
            start = end
        for key in ("steps", "layers"):
            values[key] = {where: json.loads(changes) for where, changes in getattr(self, key)} or None
        return {**values, "mask_ratios": intervals, "tile_size": list(self.tile_size)}


PRESET_KEYS = Keys.of(
    PSAPreset,
    "text_length",
    "verbose",
    "attn_impl",
    block_size=Keys.of(BlockSize, "tile_n"),
    sim_thresholds=Keys.of(SimThresholds),
)
"""The arguments of `PSAPreset`. In a file, `name` and `model` are the place of the preset and no keys."""

REPLACED = ("mask_ratios",)
"""Keys whose mapping is replaced, not merged: half of the old intervals fits no other half."""


def make_preset(values: Mapping[str, Any], overrides: Mapping[str, Any], where: str, keys: Keys) -> PSAPreset:
    """Return the preset of values with overrides laid over them.

    Args:
        values: Values by the names of the YAML.
        overrides: Changes by the same names, dotted names included.
        where: What is being made, for messages.
        keys: Keys that the overrides may have.

    Raises:
        ValueError: If a key is unknown or a value is not allowed.
    """
    return build(PSAPreset, values, overrides, where, keys=keys, whole=REPLACED, accept=drop_ignored)


@lru_cache(maxsize=4096)
def preset_of_key(key: str) -> PSAPreset:
    """Return the preset whose `key` this is. Nothing needs to have been remembered, in this process or another."""
    return PSAPreset(**json.loads(key))


def _as_part(part: type[Part], value: Any, key: str) -> Part:
    if isinstance(value, part):
        return value
    PRESET_KEYS.inside[key].check(value, key)
    return part(**value)
