"""Listen to the self-attentions of a running pipeline: q, k and v as they enter them, to judge a choice of levels."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from psa_diffusers.models.registry import Grid
from psa_diffusers.pipelines.enable import find_denoisers
from psa_diffusers.presets.ranges import check_ranges, in_ranges
from psa_diffusers.presets.schema import PSAPreset
from psa_diffusers.processors.base import Run, Site

__all__ = ["Call", "Recording", "record_qkv", "tap_qkv"]

logger = logging.getLogger("psa_diffusers")

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Call:
    """Which call of a self-attention it is.

    Attributes:
        call: Call of the pipeline, from 0.
        step: Denoising step, from 0.
        num_steps: Steps of the run, None if the pipeline does not tell.
        timestep: What the denoiser was given as `timestep`, the largest of several.
        denoiser: Name in the pipeline.
        layer: Index among the self-attentions of the denoiser.
        num_layers: Number of those.
        forward: Forward of the denoiser within the step, from 0: with guidance, Wan has two.
        grid: Frames, height, width in tokens.
        text_tokens: Text tokens in the sequence.
        text_first: Whether they stand before the video.
        scale: Softmax scale.
        sample: Which sample of how many. Texts of different lengths are recorded one by one; else None.
    """

    call: int
    step: int
    num_steps: int | None
    timestep: float
    denoiser: str
    layer: int
    num_layers: int
    forward: int
    grid: tuple[int, int, int]
    text_tokens: int
    text_first: bool
    scale: float
    sample: tuple[int, int] | None = None


@dataclass
class Recording:
    """What `record_qkv` has written so far.

    Attributes:
        path: The file. It is there once the context has been left.
        records: One dict a recorded call: `key` (its tensors are `key + "q"`, `"k"`, `"v"`) and the fields of `Call`;
            after the context also `branch`, see `record_qkv`.
        num_bytes: Size of the tensors.
        complete: Whether nothing was left out for want of space.
    """

    path: Path
    records: list[dict[str, Any]]
    num_bytes: int = 0
    complete: bool = True


@contextmanager
def record_qkv(
    pipe: Any,
    path: str | Path,
    *,
    steps: str | int | Sequence[int] | None = None,
    layers: str | int | Sequence[int] | None = None,
    heads: str | int | Sequence[int] | None = None,
    max_gib: float = 4.0,
) -> Iterator[Recording]:
    """Write q, k, v of the self-attentions to a safetensors file while the pipeline runs inside the context.

        with record_qkv(pipe, "qkv.safetensors", steps="0,-1", heads="0:4"):
            pipe(prompt)

    The tensors `[B, H, L, D]` are those that enter the attention, normed and rotated, in the dtype and the order of
    the model. What the pipeline computes does not change, whether PSA is on or off; the projections of a recorded call
    are computed a second time. Compiled denoisers run without their compiled code meanwhile. Tensors go to the disk as
    they come, so that memory holds those of one call.

    Metadata of the file: `grid`, `text_tokens`, `text_first` (of the first record), `complete`, and `records`, a JSON
    list with the place of every record (`Recording.records`). `branch` names the guidance branches of a record along
    the batch: `cond`, `uncond`, or `uncond,cond` where both run in one batch, the one half behind the other.

    Args:
        pipe: A pipeline with a denoiser of a known family.
        path: The file; one that exists is replaced when the context is left.
        steps: Denoising steps to record, as in `steps` of a preset (`0`, `-1`, `10%:50%`, several with commas), or a
            list of numbers. None records all.
        layers: Self-attentions of each denoiser to record, likewise.
        heads: Heads to keep, likewise.
        max_gib: Largest size of the tensors. What would go beyond is left out, with one warning.

    Yields:
        A `Recording` that grows while the pipeline runs.

    Raises:
        TypeError: If the pipeline has no denoiser of a known family.
        ValueError: If a range is malformed or `max_gib` is not positive.
        RuntimeError: If nothing was recorded. The message says why.
            When the pipeline raises, what was recorded until then is written all the same.
    """
    where = {"steps": _as_ranges(steps), "layers": _as_ranges(layers)}
    kept_heads = _as_ranges(heads)
    if not max_gib > 0:
        raise ValueError(f"max_gib must be positive, got {max_gib!r}")
    recording = Recording(Path(path), [])
    writer = _Writer(recording.path)

    def is_wanted(step: int, num_steps: int | None, layer: int, num_layers: int) -> bool:
        return recording.complete and (
            in_ranges(where["steps"], step, num_steps) and in_ranges(where["layers"], layer, num_layers)
        )

    def keep(q: Tensor, k: Tensor, v: Tensor, call: Call) -> None:
        index = [head for head in range(q.shape[1]) if in_ranges(kept_heads, head, q.shape[1])]
        size = 3 * q[:, index].numel() * q.element_size()
        if size == 0:
            return
        if recording.num_bytes + size > max_gib * 2**30:
            recording.complete = False
            logger.warning(
                "record_qkv: %s is full after %d calls (max_gib=%g); choose fewer steps, layers or heads",
                path, len(recording.records), max_gib,
            )  # fmt: skip
            return
        key = f"call{call.call}.step{call.step:03d}.{call.denoiser}.layer{call.layer:02d}.forward{call.forward}."
        key += "" if call.sample is None else f"sample{call.sample[0]}."
        for part, x in zip("qkv", (q, k, v), strict=True):
            writer.add(key + part, x[:, index])
        recording.num_bytes += size
        index, count = call.sample or (0, len(q))
        guided = count % 2 == 0 and getattr(pipe, "guidance_scale", 1.0) > 1
        halves = "uncond,cond" if call.sample is None else "uncond" if index < count // 2 else "cond"
        branch = halves if guided else "cond"
        recording.records.append({"key": key, **asdict(call), "grid": list(call.grid), "branch": branch})

    raised = True
    try:
        with tap_qkv(pipe, is_wanted, keep) as tape:
            yield recording
        raised = False
    finally:
        if recording.records:
            _name_branches(recording.records, tape.forwards)
            writer.finish(_metadata(recording))
        else:
            writer.drop()
    if not recording.records and not raised:
        raise RuntimeError(
            f"nothing was recorded: the denoiser ran {sum(tape.forwards.values())} times, and "
            + (f"was left out because {tape.left_out[0]}" if tape.left_out else f"no call matched {where}")
        )


@contextmanager
def tap_qkv(
    pipe: Any,
    is_wanted: Callable[[int, int | None, int, int], bool],
    sink: Callable[[Tensor, Tensor, Tensor, Call], None],
) -> Iterator[_Tape]:
    """Hand q, k, v of the self-attentions to a function while the pipeline runs inside the context.

    Args:
        pipe: A pipeline with a denoiser of a known family.
        is_wanted: `(step, num_steps, layer, num_layers)` to whether that call is wanted; asked before any cost.
        sink: Gets q, k, v `[B, H, L, D]`, which it must not change, and the `Call`.
    """
    tape = _Tape(pipe, is_wanted, sink)
    hooks = []
    found = find_denoisers(pipe)
    try:
        for name, denoiser, family in found:
            site = _TapedSite(name, denoiser, family, tape)
            hooks.append(denoiser.register_forward_pre_hook(site.before_forward, with_kwargs=True))
            # its own class of processor, so that q, k, v are made by the one piece of code that knows how
            kind = type("Tap", (_Tap, family.processor), {})
            attentions = family.self_attentions(denoiser)
            for index, (layer, attention) in enumerate(attentions.items()):
                tap = kind(layer, family.default_processor(denoiser, layer, attention), site)
                tap.index, tap.count = index, len(attentions)
                tap.make_default = functools.partial(family.default_processor, denoiser, layer)
                hooks.append(attention.register_forward_pre_hook(tap.listen, with_kwargs=True))
        # compiled code would not see the hooks
        with torch.compiler.set_stance("force_eager"):
            yield tape
    finally:
        for hook in hooks:
            hook.remove()


class _Tape(Run):
    """The clock of the taps, and where they deliver.

    Attributes:
        forwards: Forwards by (call of the pipeline, step, denoiser).
        left_out: Reasons why wanted calls could not be read.
    """

    def __init__(self, pipe: Any, is_wanted: Callable[..., bool], sink: Callable[..., None]) -> None:
        super().__init__(PSAPreset(), "recording", report=False)
        self.pipe = pipe
        self.is_wanted = is_wanted
        self.sink = sink
        self.forwards: Counter[tuple[int, int, str]] = Counter()
        self.left_out: list[str] = []
        self.timestep = 0.0
        self.calls = 0

    def before_forward(self, timestep: Any, *, rises: bool = False) -> None:
        self.clock.set_length(getattr(self.pipe, "num_timesteps", None))
        self.timestep = float(timestep.max() if hasattr(timestep, "max") else timestep)
        self.calls += self.clock.observe(-timestep if rises else timestep)


class _TapedSite(Site):
    """Counts the forwards of its denoiser within a step."""

    def before_forward(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().before_forward(denoiser, args, kwargs)
        self.run.forwards[self.run.calls - 1, self.run.clock.step, self.name] += 1


class _Tap:
    """Mixed into a family's processor: makes q, k, v as that does, and delivers them instead of attending.

    Attributes:
        index: Which self-attention of the denoiser.
        count: How many there are.
    """

    index: int
    count: int
    site: Site
    layer: str
    sample: tuple[int, int] | None = None

    @torch.no_grad()
    def listen(self, attn: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Torch's forward pre-hook of the attention, with keyword arguments. Changes nothing."""
        clock = self.site.run.clock
        if self.site.run.is_wanted(clock.step, clock.num_steps, self.index, self.count):
            self.original = self.make_default(attn)
            named = inspect.signature(type(self).__call__).parameters  # diffusers drops what a processor does not name
            self(attn, *args, **{name: value for name, value in kwargs.items() if name in named})

    def dense(self, reason: str, tokens: int, attn: nn.Module, *args: Any, **kwargs: Any) -> None:
        run = self.site.run
        if reason not in run.left_out:
            run.left_out.append(reason)
            logger.warning("a recording leaves %s out: %s", self.layer, reason)

    def sparse_padded(self, q: Tensor, k: Tensor, v: Tensor, *, text_tokens: int, text_lengths: Tensor) -> Tensor:
        self.sample = (0, len(q)) if len(text_lengths.unique()) > 1 else None
        return super().sparse_padded(q, k, v, text_tokens=text_tokens, text_lengths=text_lengths)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, text_tokens: int, grid: Grid) -> tuple[Tensor, None]:
        site, run = self.site, self.site.run
        call = Call(
            call=run.calls - 1,
            step=run.clock.step,
            num_steps=run.clock.num_steps,
            timestep=run.timestep,
            denoiser=site.name,
            layer=self.index,
            num_layers=self.count,
            forward=run.forwards[run.calls - 1, run.clock.step, site.name] - 1,
            grid=grid,
            text_tokens=text_tokens,
            text_first=site.family.text_first,
            scale=q.shape[-1] ** -0.5,
            sample=self.sample,
        )
        if self.sample is not None:
            self.sample = self.sample[0] + 1, self.sample[1]
        # autocast keeps norms in float32; attention would cast back as well
        run.sink(q.to(v.dtype), k.to(v.dtype), v, call)
        return v, None  # of the right shape; what follows from it is thrown away


class _Writer:
    """A safetensors file written tensor by tensor: the data goes beside it, the header is known at the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._data = path.with_name(path.name + ".data")
        self._header: dict[str, Any] = {}
        self._file: Any = None
        self._end = 0

    def add(self, key: str, tensor: Tensor) -> None:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._data.open("wb")
        tensor = tensor.detach().contiguous().cpu()
        start, self._end = self._end, self._end + tensor.numel() * tensor.element_size()
        self._header[key] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, self._end],
        }
        self._file.write(tensor.view(torch.uint8).numpy().data)

    def finish(self, metadata: dict[str, str]) -> None:
        """Put header and data together under the name of the file."""
        self._file.close()
        header = json.dumps({"__metadata__": metadata, **self._header}).encode()
        header += b" " * (-len(header) % 8)
        whole = self._path.with_name(self._path.name + ".part")
        try:
            with whole.open("wb") as target, self._data.open("rb") as source:
                target.write(len(header).to_bytes(8, "little") + header)
                shutil.copyfileobj(source, target)
            whole.replace(self._path)
        finally:
            whole.unlink(missing_ok=True)
            self._data.unlink(missing_ok=True)

    def drop(self) -> None:
        if self._file is not None:
            self._file.close()
        self._data.unlink(missing_ok=True)


def _as_ranges(given: str | int | Sequence[int] | None) -> str:
    if given is None:
        return ":"
    if not isinstance(given, (str, int)):
        given = ",".join(map(str, given))
    return check_ranges(given)


def _name_branches(records: list[dict[str, Any]], forwards: Mapping[tuple[int, int, str], int]) -> None:
    """Where a step had two forwards, diffusers ran the prompt's first and the negative prompt's second."""
    for record in records:
        if forwards[record["call"], record["step"], record["denoiser"]] > 1:
            record["branch"] = ("cond", "uncond")[record["forward"] % 2]


def _metadata(recording: Recording) -> dict[str, str]:
    first = recording.records[0]
    return {
        "grid": " ".join(map(str, first["grid"])),
        "text_tokens": str(first["text_tokens"]),
        "text_first": str(first["text_first"]).lower(),
        "complete": str(recording.complete).lower(),
        "records": json.dumps(recording.records),
    }
