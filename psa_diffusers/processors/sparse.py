"""How a sparse call of a self-attention runs: alone, without padding, with a kept schedule, over several GPUs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from psa_diffusers.attention import needs_grad, psa_attention, say_once
from psa_diffusers.models.registry import Grid
from psa_diffusers.ops.types import Schedule
from psa_diffusers.presets import PSAPreset, preset_of_key
from psa_diffusers.processors import ulysses
from psa_diffusers.processors.recorder import Measured
from psa_diffusers.processors.reuse import Branch
from psa_diffusers.processors.run import is_captured
from psa_diffusers.processors.site import Site


class Place(NamedTuple):
    """Where the tokens of a call stand.

    Attributes:
        grid: Frames, height, width of the video in tokens.
        text_tokens: Tokens beside the grid, all of them valid.
        text_first: Whether these stand before the video.
        sample: Which sample of how many, where samples of different lengths attend one by one; else None.
    """

    grid: Grid
    text_tokens: int
    text_first: bool
    sample: tuple[int, int] | None = None

    def arguments(self) -> dict[str, Any]:
        """The same for `psa_attention`."""
        return {"grid": self.grid, "text_tokens": self.text_tokens, "text_first": self.text_first}


class Tap(Protocol):
    """Gets what enters a self-attention, in place of the attention. Nothing is attended to then."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, place: Place) -> None:
        """Take q, k, v `[B, H, L, D]`, normed and rotated, in the dtype of v. They must not be changed."""

    def left_out(self, reason: str, layer: str) -> None:
        """Hear why a call could not be handed over."""


class SparseCalls:
    """The sparse half of a processor.

    Args:
        layer: Module path of the attention in the denoiser.
        original: The processor that was found there. It runs every dense call.
        site: The denoiser.
        tap: Who gets q, k and v instead of attention.

    Attributes:
        preset: What to do in this layer and the running step. Stands here, not in a list by layer, because compiled
            code makes a version for each value it reads: a handful of presets, but dozens of layers.
    """

    has_context: ClassVar[bool] = False

    def __init__(self, layer: str, original: Any, site: Site, *, tap: Tap | None = None) -> None:
        self.layer = layer
        self.original = original
        self.site = site
        self.tap = tap
        self.dealer = ulysses.HeadDealer()
        self.preset = site.join(self)

    def sparse(self, q: Tensor, k: Tensor, v: Tensor, *, text_tokens: int = 0, grid: Grid | None = None) -> Tensor:
        """Run pyramid sparse attention.

        Args:
            q: ``[B, H, L, D]`` view.
            k: The same.
            v: The same.
            text_tokens: Tokens that are not on the grid, in front or behind as the family says.
            grid: Where these tokens are on another grid than that of the denoiser's inputs.
        """
        if grid is None and self._is_one_graph():
            q, k = q.to(v.dtype), k.to(v.dtype)
            if why_new := self._why_new(q, k, v):
                self._say_new(why_new)
            return _grid_op(q, k, v, self.site.sizes, self.preset.key, text_tokens, self.site.family.text_first)
        place = Place(grid or self._grid(), text_tokens, self.site.family.text_first)
        out, measured = self._attend(q, k, v, place)
        if measured is not None:
            is_split = ulysses.context_parallel(self.original) is not None
            self._note("sparse", measured, math.prod(place.grid) if is_split else q.shape[2], place.grid)
        return out

    def sparse_padded(self, q: Tensor, k: Tensor, v: Tensor, *, text_tokens: int, text_lengths: Tensor) -> Tensor:
        """The same for sequences that end in padded text: every sample without its padding, which gets zeros.

        What becomes of padding does not matter: no token of a later layer reads it.

        Args:
            q: ``[B, H, L, D]`` view.
            k: The same.
            v: The same.
            text_tokens: Tokens of text at the end, padding included.
            text_lengths: How many of them are valid, ``[B]`` integers on the CPU.
        """
        if torch.compiler.is_compiling() and self.site.run.recorder is None:
            if why_new := self._why_new(q, k, v):
                self._say_new(why_new)
            # one graph for texts of any length: what depends on the length stands inside the operator
            q, k = q.to(v.dtype), k.to(v.dtype)
            return _padded_op(q, k, v, text_lengths, self.site.sizes, self.preset.key, text_tokens)

        grid = self._grid()
        all_measured: list[Measured | None] = []

        def attend(q: Tensor, k: Tensor, v: Tensor, text_tokens: int, sample: tuple[int, int] | None) -> Tensor:
            out, measured = self._attend(q, k, v, Place(grid, text_tokens, False, sample))
            all_measured.append(measured)
            return out

        out = _without_padding(attend, q, k, v, text_lengths, text_tokens)
        noted = [measured for measured in all_measured if measured is not None]
        if noted:
            tokens = q.shape[2] - text_tokens + int(text_lengths.max())
            reasons, densities, kept = zip(*noted, strict=True)
            self._note("sparse", Measured(reasons[0], torch.stack(densities).mean(), all(kept)), tokens, grid)
        return out

    def _text_lengths(self) -> Tensor:
        lengths = self.site.text_lengths
        if lengths is None:
            raise RuntimeError(f"{self.layer} cannot run sparse: the inputs of the denoiser do not tell valid text")
        return lengths

    def _grid(self) -> Grid:
        grid = self.site.grid
        if grid is None:
            raise RuntimeError(f"{self.layer} cannot run sparse: the inputs of the denoiser do not tell the token grid")
        return grid

    def _why_new(self, q: Tensor, k: Tensor, v: Tensor) -> str:
        """Say why the level map of this call is not kept although `refresh_every` asks for it; empty if all is well."""
        if self.site.run.kept.steps == 1:
            return ""
        if torch.compiler.is_compiling():
            return "compiled code decides anew in every call what is read"
        if is_captured(q):
            return "a CUDA graph is being captured, which may be replayed in any step"
        parallel = ulysses.context_parallel(self.original)
        if parallel is not None and self.dealer.is_needed(self.preset, q.shape[1], parallel.ulysses_degree):
            return "its heads are dealt to the processes anew in every call"
        if needs_grad(q, k, v):
            return "a gradient is required, and in training the next call is of another video"
        if self.site.branch is None:
            return "nothing tells the denoising step"
        return ""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, place: Place) -> tuple[Tensor, Measured | None]:
        """Return what attention gives, and what there is to record if anybody asks."""
        # autocast keeps norms in float32; dense attention would cast back as well
        q, k = q.to(v.dtype), k.to(v.dtype)
        if not torch.compiler.is_compiling():
            self.site.run.ran_sparse = True
        if self.tap is not None:
            self.tap(q, k, v, place)
            return v, None  # of the right shape; what follows from it is thrown away
        why_new = self._why_new(q, k, v)
        if why_new:
            self._say_new(why_new)
        branch = None if why_new else self.site.branch
        if ulysses.context_parallel(self.original) is not None:
            return self._attend_in_parallel(q, k, v, place, branch, why_new)
        if self.site.run.recorder is None and branch is None:
            return _attention(q, k, v, self.preset, place), None
        return self._attend_observed(q, k, v, place, branch, why_new)

    @torch.compiler.disable  # communicates, and the order of the heads changes
    def _attend_in_parallel(
        self, q: Tensor, k: Tensor, v: Tensor, place: Place, branch: Branch | None, why_new: str
    ) -> tuple[Tensor, Measured | None]:
        config = ulysses.context_parallel(self.original)
        used: list[tuple[Schedule, bool]] = []

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, schedule, is_kept = self._attend_or_reuse(q, k, v, place, branch)
            used.append((schedule, is_kept))
            return out

        deals = self.dealer.is_needed(self.preset, q.shape[1], config.ulysses_degree)
        order = self.dealer.order if deals else None
        out = ulysses.attend(q, k, v, self.original._parallel_config, attention, order)
        schedule, is_kept = used[0]
        if deals:
            self.dealer.learn(ulysses.cost_of_heads(schedule), config)
        return out, self._measure(schedule, is_kept, why_new)

    # what is recorded or kept changes with every call: compiled, it would be compiled again and again
    @torch.compiler.disable
    def _attend_observed(
        self, q: Tensor, k: Tensor, v: Tensor, place: Place, branch: Branch | None, why_new: str
    ) -> tuple[Tensor, Measured | None]:
        out, schedule, is_kept = self._attend_or_reuse(q, k, v, place, branch)
        return out, self._measure(schedule, is_kept, why_new)

    def _attend_or_reuse(
        self, q: Tensor, k: Tensor, v: Tensor, place: Place, branch: Branch | None
    ) -> tuple[Tensor, Schedule, bool]:
        """Return output, schedule, and whether the schedule is that of an earlier step, which the branch has kept."""

        def attention(schedule: Schedule | None = None) -> tuple[Tensor, Schedule]:
            out: Any = psa_attention(q, k, v, self.preset, **where, schedule=schedule, return_schedule=True)
            return out

        where = place.arguments()
        if branch is None:
            return *attention(), False
        shape = (q.shape, q.dtype, q.device, self.preset.key, place.grid, place.text_tokens, place.text_first)
        return branch.attend(self.layer, shape, attention)

    def _is_one_graph(self) -> bool:
        """Whether compiled code serves videos of any size: the grid is then an input of the graph, not a constant.

        Not where tokens beside the grid are counted by it, nor where what runs is recorded or communicates.
        """
        is_plain = self.site.run.recorder is None and not self.has_context
        return torch.compiler.is_compiling() and is_plain and ulysses.context_parallel(self.original) is None

    def _measure(self, schedule: Schedule, is_kept: bool, why_new: str) -> Measured | None:
        return None if self.site.run.recorder is None else Measured(why_new, schedule.density(), is_kept)

    def _say_new(self, reason: str) -> None:
        if torch.compiler.is_compiling():
            _say_compiled(f"PSA runs without keeping level maps: {reason}, whatever refresh_every says")
        else:
            self.site.run.say(reason, self.layer, "without keeping its level map")

    @torch.compiler.disable
    def _note(self, kind: str, measured: Measured, tokens: int, grid: Grid | None) -> None:
        site = self.site
        if site.run.recorder is not None:
            site.run.recorder.note(
                step=site.run.clock.step,
                denoiser=site.name,
                layer=self.layer,
                kind=kind,
                **measured._asdict(),
                tokens=tokens,
                grid=grid,
            )


def _attention(q: Tensor, k: Tensor, v: Tensor, preset: PSAPreset, place: Place) -> Tensor:
    out = psa_attention(q, k, v, preset, **place.arguments())
    assert isinstance(out, Tensor)  # no schedule was asked for
    return out


@torch.compiler.assume_constant_result  # runs while torch compiles, not in compiled code
def _say_compiled(message: str) -> bool:
    say_once(message)
    return True


def _without_padding(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, text_lengths: Tensor, text_tokens: int
) -> Tensor:
    """Attend to the valid part of every sample, samples of one length at once."""
    lengths = text_lengths.tolist()
    alike = len(set(lengths)) == 1
    outs = []
    for number in [None] if alike else range(len(lengths)):
        samples = slice(None) if number is None else slice(number, number + 1)
        valid = lengths[samples][0]
        padding = text_tokens - valid
        parts = (x[samples, :, : x.shape[2] - padding] for x in (q, k, v))
        out = attend(*parts, valid, None if number is None else (number, len(lengths)))
        outs.append(nn.functional.pad(out, (0, 0, 0, padding)))
    return torch.cat(outs)


@torch.library.custom_op("psa_diffusers::psa_attention_padded", mutates_args=())
def _padded_op(
    q: Tensor, k: Tensor, v: Tensor, text_lengths: Tensor, sizes: Tensor, preset_key: str, text_tokens: int
) -> Tensor:
    grid = tuple(sizes.tolist())

    def attend(q: Tensor, k: Tensor, v: Tensor, text_tokens: int, sample: tuple[int, int] | None) -> Tensor:
        preset = preset_of_key(preset_key)
        return _attention(q, k, v, preset, Place(grid, text_tokens, False))

    return _without_padding(attend, q, k, v, text_lengths, text_tokens).contiguous()


@_padded_op.register_fake
def _(q, k, v, text_lengths, sizes, preset_key, text_tokens):
    return q.new_empty(q.shape)


@torch.library.custom_op("psa_diffusers::psa_attention_on_grid", mutates_args=())
def _grid_op(
    q: Tensor, k: Tensor, v: Tensor, sizes: Tensor, preset_key: str, text_tokens: int, text_first: bool
) -> Tensor:
    grid = tuple(sizes.tolist())
    if math.prod(grid) + text_tokens != q.shape[2]:
        say_once(f"PSA runs dense: {q.shape[2] - text_tokens} video tokens do not fill the grid {grid}")
        return nn.functional.scaled_dot_product_attention(q, k, v)
    preset = preset_of_key(preset_key)
    return _attention(q, k, v, preset, Place(grid, text_tokens, text_first))


@_grid_op.register_fake
def _(q, k, v, sizes, preset_key, text_tokens, text_first):
    return torch.empty_like(q)
