"""Attention processors: what all families share, and the one that users hand to diffusers themselves.

Everything here is a plain object, never a module: weights, `state_dict`, `.to`, offload and LoRA do not notice.
"""

from __future__ import annotations

import inspect
import logging
import math
import sys
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from psa_diffusers.attention import needs_grad, psa_attention, say_once, unsupported_head_dim
from psa_diffusers.models.registry import Family, Grid, attention_paths, find_family, supported, unwrap
from psa_diffusers.ops.reference.schedule import Schedule
from psa_diffusers.pipelines.report import Recorder
from psa_diffusers.presets.schema import PSAPreset, list_presets, load_preset, preset_of_key
from psa_diffusers.processors import ulysses
from psa_diffusers.processors.clock import WarmupScheduler
from psa_diffusers.processors.dense import fastest_dense
from psa_diffusers.processors.reuse import Branch, KeptSchedules

logger = logging.getLogger("psa_diffusers")

_WRONG_KIND = "preset must be a name, a PSAPreset or None (the default of the model), got a {}"
_ARGUMENTS = (
    "hidden_states",
    "encoder_hidden_states",
    "attention_mask",
    "temb",
    "rotary_emb",
    "image_rotary_emb",
    "query_rotary_emb",
    "key_rotary_emb",
    "perturbation_mask",
    "all_perturbed",
    "sparse_params",
    "original_context_length",
    "image_embed_seq_len",
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Run:
    """What the processors of one enabled pipeline share: the preset, the clock, the records, the kept schedules.

    Args:
        preset: What to do in sparse steps.
        title: What was enabled, one line for the report.
        report: Whether to record every call.
    """

    def __init__(self, preset: PSAPreset, title: str, *, report: bool) -> None:
        self.preset = preset
        self.clock = WarmupScheduler(preset.warmup_steps, dense_last_steps=preset.dense_last_steps)
        self.recorder = Recorder(title) if report else None
        self.kept = KeptSchedules(preset.refresh_every)
        self.is_on = True
        self.pipe: Any = None
        self.fed_by_callback = False
        self._said: set[str] = set()

    def begin(self, pipe: Any, *, fed_by_callback: bool) -> None:
        """Start a call of a pipeline."""
        self._forget()
        self.clock.reset()
        self.pipe, self.fed_by_callback = pipe, fed_by_callback

    def end(self) -> None:
        """End the call, however it ended. Its records stay until the next one."""
        self.clock.reset()
        self.kept.clear()
        self.pipe, self.fed_by_callback = None, False

    def switch_off(self) -> None:
        """From now on the processors only forward: somebody may have copies of them."""
        self.is_on = False
        self.kept.clear()

    def before_forward(self, timestep: Any, *, rises: bool = False) -> None:
        """Let the clock know that a denoiser is about to run.

        Args:
            timestep: What it is given as `timestep`.
            rises: Whether that rises from step to step; the clock wants it to fall.
        """
        if self.pipe is not None and not torch.compiler.is_compiling():
            self.clock.set_length(getattr(self.pipe, "num_timesteps", None))
        # reading a timestep waits for the GPU, so only if nobody else tells the step and somebody wants to know it
        is_asked = not self.clock.idle or self.preset.steps or self.recorder is not None or self.kept.steps > 1
        if _is_captured(timestep):
            if not self.clock.idle or self.preset.steps:
                self.say(
                    "a CUDA graph is being captured, which repeats this step in every replay: capture one for each "
                    "kind of step, or set warmup_steps=0",
                    "the denoiser",
                    how=f"as in step {self.clock.step}",
                )
        elif is_asked and not self.fed_by_callback and timestep is not None:
            is_new_run = self.clock.observe(-timestep if rises else timestep)
            if is_new_run:
                self._forget()

    def branch(self, denoiser: str, inputs: Mapping[str, Any]) -> Branch | None:
        """Return the guidance branch of the forward that begins; None if nobody asks or its step is not known."""
        is_known = self.fed_by_callback or inputs.get("timestep") is not None
        if self.kept.steps == 1 or torch.compiler.is_compiling() or not is_known:
            return None
        return self.kept.branch(denoiser, inputs.get("encoder_hidden_states"), (self.clock.rounds, self.clock.step))

    def say(self, reason: str, layer: str, how: str = "dense") -> None:
        """Log, once a call and reason, why a layer does not run as the user wishes."""
        if reason not in self._said and not torch.compiler.is_compiling():
            self._said.add(reason)
            logger.warning("PSA runs %s %s: %s", layer, how, reason)

    def _forget(self) -> None:
        self._said.clear()
        self.kept.clear()
        if self.recorder is not None:
            self.recorder.clear()


class Site:
    """One denoiser of a `Run`: before each forward it reads from the inputs what the processors need.

    Holds no reference to the denoiser.

    Attributes:
        name: Name in the pipeline.
        family: What is known of its architecture.
        run: The run it belongs to.
        grid: Token grid of the forward that is running, None if its inputs do not tell.
        text_lengths: Valid text tokens of each sample, ``[B]`` integers on the CPU, where the family has padded text.
        branch: Where the schedules of that forward are kept, None if they are not.
    """

    def __init__(self, name: str, denoiser: nn.Module, family: Family, run: Run) -> None:
        self.name = name
        self.family = family
        self.run = run
        self.grid: tuple[int, int, int] | None = None
        self.text_lengths: Tensor | None = None
        self.branch: Branch | None = None
        self._layers = list(family.self_attentions(denoiser))
        # that of the class splits the video tokens, and nothing else, as the processors expect
        self.has_parallel_plan = getattr(type(denoiser), "_cp_plan", None) is not None
        self._processors: list[FamilyProcessor] = []
        self._config = denoiser.config
        # of the class: an instance's forward may be wrapped by offloading
        self._names = tuple(inspect.signature(type(denoiser).forward).parameters)[1:]

    def before_forward(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Torch's forward pre-hook with keyword arguments. Only shapes are read: tensors may be elsewhere still."""
        inputs = {**dict(zip(self._names, args)), **kwargs}  # noqa: B905 - fewer positional arguments than names
        self.grid = self.family.read_grid(self._config, inputs)
        if self.family.read_text is not None:
            self.text_lengths = self.family.read_text(self._config, inputs)
        self.run.before_forward(inputs.get("timestep"), rises=self.family.timesteps_rise)
        self.branch = self.run.branch(self.name, inputs)
        if self.run.preset.steps:
            for processor in self._processors:
                processor.preset = self._preset_now(processor.layer)

    def join(self, processor: FamilyProcessor) -> PSAPreset:
        """Take note of a processor; return what it has to do in the first step."""
        self._processors.append(processor)
        return self._preset_now(processor.layer)

    def _preset_now(self, layer: str) -> PSAPreset:
        clock, place = self.run.clock, self._layers.index(layer)
        return self.run.preset.at(clock.step, clock.num_steps, place, len(self._layers))


class Measured(NamedTuple):
    """What is recorded of a call.

    Attributes:
        reason: Why it is not as asked: dense, or sparse without a level map that could be kept. Else empty.
        density: Share of the dense work.
        kept: Whether the level map is that of an earlier step.
    """

    reason: str = ""
    density: float | Tensor = 1.0
    kept: bool = False


class FamilyProcessor:
    """Base of the families' processors: decides between dense and sparse, and notes what ran.

    A family adds `__call__`, which mirrors the upstream processor with one call changed. It names every argument,
    because diffusers drops what the signature does not name.

    Args:
        layer: Module path of the attention in the denoiser.
        original: The processor that was found there. It runs every dense call.
        site: The denoiser.

    Attributes:
        preset: What to do in this layer and the running step. Stands here, not in a list by layer, because compiled
            code makes a version for each value it reads: a handful of presets, but dozens of layers.
    """

    def __init__(self, layer: str, original: Any, site: Site) -> None:
        self.layer = layer
        self.original = original
        self.site = site
        self.dealer = ulysses.HeadDealer()
        self.preset = site.join(self)

    @property
    def psa_recorders(self) -> list[Recorder]:
        """Recorders of the run, for `psa_report`."""
        recorder = self.site.run.recorder
        return [] if recorder is None else [recorder]

    # diffusers sets these two on processors that have them; they belong to the original, which runs the dense calls
    @property
    def _attention_backend(self) -> Any:
        return self.original._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.original._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return self.original._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.original._parallel_config = config

    def why_dense(self, attn: nn.Module, hidden_states: Tensor, attention_mask: Any, *, context: bool = False) -> str:
        """Say why this call must be dense; empty if it can be sparse.

        Args:
            attn: The attention module.
            hidden_states: Its video tokens ``[B, S, C]``.
            attention_mask: A mask that the sparse path could not honour.
            context: Whether there may be other tokens (history, keyframes) among the video tokens.
        """
        site, run = self.site, self.site.run
        if not run.is_on:
            return "PSA is off"
        if self.preset.type == "dense":
            return "the preset is dense" if run.preset.type == "dense" else "the preset is dense here"
        if run.clock.dense:
            return run.clock.reason
        if _scores_are_skipped(attn):
            return "perturbed attention guidance replaces its attention"
        if attention_mask is not None:
            return "an attention mask is in use"
        parallel = ulysses.context_parallel(self.original)
        if parallel is not None and (reason := ulysses.why_not(parallel, site.has_parallel_plan)):
            return reason
        if site.grid is None:
            return "the inputs of the denoiser do not tell the token grid"
        frames, height, width = site.grid
        expected = frames * height * width
        if parallel is not None:
            expected, context = ulysses.local_tokens(parallel, expected), False
        if hidden_states.shape[1] != expected and not (context and self.context_tokens(hidden_states)):
            return f"{hidden_states.shape[1]} video tokens do not fill the grid {frames} x {height} x {width}"
        if hidden_states.dtype not in DTYPES:
            return f"the dtype {hidden_states.dtype} is not supported"
        if site.family.read_text is not None:
            if site.text_lengths is None:
                return "the padding of the text is not at its end"
            if len(site.text_lengths) != len(hidden_states):
                return "something between the denoiser and its layers has changed the batch"
        return unsupported_head_dim(self.head_dim(attn)) or ""

    def head_dim(self, attn: nn.Module) -> int:
        """Return the channels of a head."""
        return attn.inner_dim // attn.heads

    def context_tokens(self, hidden_states: Tensor) -> int:
        """Return how many of the tokens ``[B, S, C]`` are beyond the grid; 0 if they do not even fill it."""
        frames, height, width = self.site.grid
        return max(hidden_states.shape[1] - frames * height * width, 0)

    def dense(self, reason: str, tokens: int, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the original processor with exactly the arguments that came, the video tokens first."""
        run = self.site.run
        if run.is_on:
            if run.recorder is not None:
                self._note("dense", Measured(reason), tokens, self.site.grid)
            if not run.clock.dense and self.preset.type != "dense":
                run.say(reason, self.layer)
            with fastest_dense(args[0]):
                return self.original(attn, *args, **kwargs)
        return self.original(attn, *args, **kwargs)

    def sparse(self, q: Tensor, k: Tensor, v: Tensor, *, text_tokens: int = 0, grid: Grid | None = None) -> Tensor:
        """Run pyramid sparse attention.

        Args:
            q: ``[B, H, L, D]`` view.
            k: The same.
            v: The same.
            text_tokens: Tokens that are not on the grid, in front or behind as the family says.
            grid: Where these tokens are on another grid than that of the denoiser's inputs.
        """
        grid = grid or self.site.grid
        out, measured = self.attend(q, k, v, text_tokens, grid)
        if measured is not None:
            is_split = ulysses.context_parallel(self.original) is not None
            self._note("sparse", measured, math.prod(grid) if is_split else q.shape[2], grid)
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
        grid, all_measured = self.site.grid, []
        if torch.compiler.is_compiling() and self.site.run.recorder is None:
            if why_new := self.why_new(q, k, v):
                self._say_new(why_new)
            # one graph for texts of any length: what depends on the length stands inside the operator
            q, k = q.to(v.dtype), k.to(v.dtype)
            return _padded_op(q, k, v, text_lengths, self.preset.key, list(grid), text_tokens)

        def attend(q: Tensor, k: Tensor, v: Tensor, text_tokens: int) -> Tensor:
            out, measured = self.attend(q, k, v, text_tokens, grid)
            all_measured.append(measured)
            return out

        out = _without_padding(attend, q, k, v, text_lengths, text_tokens)
        if all_measured[0] is not None:
            tokens = q.shape[2] - text_tokens + int(text_lengths.max())
            reasons, densities, kept = zip(*all_measured, strict=True)
            self._note("sparse", Measured(reasons[0], torch.stack(densities).mean(), all(kept)), tokens, grid)
        return out

    def why_new(self, q: Tensor, k: Tensor, v: Tensor) -> str:
        """Say why the level map of this call is not kept although `refresh_every` asks for it; empty if all is well."""
        if self.site.run.kept.steps == 1:
            return ""
        if torch.compiler.is_compiling():
            return "compiled code decides anew in every call what is read"
        if _is_captured(q):
            return "a CUDA graph is being captured, which may be replayed in any step"
        parallel = ulysses.context_parallel(self.original)
        if parallel is not None and self.dealer.is_needed(self.preset, q.shape[1], parallel.ulysses_degree):
            return "its heads are dealt to the processes anew in every call"
        if needs_grad(q, k, v):
            return "a gradient is required, and in training the next call is of another video"
        if self.site.branch is None:
            return "nothing tells the denoising step"
        return ""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, text_tokens: int, grid: Grid) -> tuple[Tensor, Measured | None]:
        """Return what attention gives, and what there is to record if anybody asks."""
        # autocast keeps norms in float32; dense attention would cast back as well
        q, k = q.to(v.dtype), k.to(v.dtype)
        place = {"grid": grid, "text_tokens": text_tokens, "text_first": self.site.family.text_first}
        why_new = self.why_new(q, k, v)
        if why_new:
            self._say_new(why_new)
        branch = None if why_new else self.site.branch
        if ulysses.context_parallel(self.original) is not None:
            return self._attend_in_parallel(q, k, v, place, branch, why_new)
        if self.site.run.recorder is None and branch is None:
            return psa_attention(q, k, v, self.preset, **place), None
        return self._attend_observed(q, k, v, place, branch, why_new)

    @torch.compiler.disable  # communicates, and the order of the heads changes
    def _attend_in_parallel(
        self, q: Tensor, k: Tensor, v: Tensor, place: dict[str, Any], branch: Branch | None, why_new: str
    ) -> tuple[Tensor, Measured | None]:
        config, used = ulysses.context_parallel(self.original), []

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, *schedule = self._attend_or_reuse(q, k, v, place, branch)
            used.append(schedule)
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
        self, q: Tensor, k: Tensor, v: Tensor, place: dict[str, Any], branch: Branch | None, why_new: str
    ) -> tuple[Tensor, Measured | None]:
        out, schedule, is_kept = self._attend_or_reuse(q, k, v, place, branch)
        return out, self._measure(schedule, is_kept, why_new)

    def _attend_or_reuse(
        self, q: Tensor, k: Tensor, v: Tensor, place: dict[str, Any], branch: Branch | None
    ) -> tuple[Tensor, Schedule, bool]:
        """Return output, schedule, and whether the schedule is that of an earlier step, which the branch has kept."""
        attention = partial(psa_attention, q, k, v, self.preset, **place, return_schedule=True)
        if branch is None:
            return *attention(), False
        shape = (q.shape, q.dtype, q.device, self.preset.key, *place.values())
        return branch.attend(self.layer, shape, lambda schedule: attention(schedule=schedule))

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
        site.run.recorder.note(
            step=site.run.clock.step,
            denoiser=site.name,
            layer=self.layer,
            kind=kind,
            **measured._asdict(),
            tokens=tokens,
            grid=grid,
        )


def _is_captured(x: Any) -> bool:
    """Whether x is a tensor in a CUDA graph that is being captured.

    Such a graph would read a kept schedule after its memory has gone, and its numbers cannot be read at all.
    """
    is_asked = isinstance(x, Tensor) and x.is_cuda and not torch.compiler.is_compiling()
    return is_asked and torch.cuda.is_current_stream_capturing()


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
    for samples in [slice(None)] if alike else [slice(i, i + 1) for i in range(len(lengths))]:
        valid = lengths[samples][0]
        padding = text_tokens - valid
        parts = (x[samples, :, : x.shape[2] - padding] for x in (q, k, v))
        outs.append(nn.functional.pad(attend(*parts, valid), (0, 0, 0, padding)))
    return torch.cat(outs)


@torch.library.custom_op("psa_diffusers::psa_attention_padded", mutates_args=())
def _padded_op(
    q: Tensor, k: Tensor, v: Tensor, text_lengths: Tensor, preset_key: str, grid: list[int], text_tokens: int
) -> Tensor:
    def attend(q: Tensor, k: Tensor, v: Tensor, text_tokens: int) -> Tensor:
        preset = preset_of_key(preset_key)
        return psa_attention(q, k, v, preset, grid=tuple(grid), text_tokens=text_tokens, text_first=False)

    return _without_padding(attend, q, k, v, text_lengths, text_tokens).contiguous()


@_padded_op.register_fake
def _(q, k, v, text_lengths, preset_key, grid, text_tokens):
    return q.new_empty(q.shape)


def _scores_are_skipped(attn: nn.Module) -> bool:
    """Return whether a hook of diffusers has torch's attention return the values, which only the original calls."""
    hooks = getattr(getattr(attn, "_diffusers_hook", None), "hooks", None) or {}
    return any(getattr(hook, "skip_attention_scores", False) for hook in hooks.values())


def resolve_preset(
    preset: str | PSAPreset | None,
    config: str | Path | None,
    overrides: Mapping[str, Any],
    *,
    family: Family,
    denoiser: nn.Module,
    pipe: Any = None,
) -> tuple[PSAPreset, str]:
    """Find the preset for a denoiser by its own config.

    Args:
        preset: Name, preset, or None for the default of the denoiser's section.
        config: The user's own YAML.
        overrides: Preset fields by their YAML names.
        family: Family of the denoiser.
        denoiser: The denoiser.
        pipe: Its pipeline, if there is one.

    Returns:
        The preset, and one line that says where it came from.

    Raises:
        TypeError: If `preset` is something else.
        ValueError: If there is no such preset, or an override is wrong.
    """
    if isinstance(preset, PSAPreset):
        return (preset.replace(**overrides) if overrides else preset), f"PSA preset {preset.name!r}, given as an object"
    if preset is not None and not isinstance(preset, str):
        raise TypeError(_WRONG_KIND.format(type(preset).__name__))
    section, is_exact = family.section_of(denoiser, pipe)
    resolved = load_preset(section, preset, config=config, **overrides)
    title = f"PSA preset {resolved.name!r} of section {section}"
    if not is_exact:
        heads, layers = family.read_size(denoiser.config)
        title += f", the nearest one: no section was made for {heads} heads and {layers} layers"
    return resolved, title


class PSAProcessor:
    """Pyramid sparse attention as one attention processor, for the ways in which diffusers sets processors.

    `pipe.set_attn_processor(PSAProcessor("psa_balanced"))` is `enable_psa(pipe, "psa_balanced")`.
    `pipe.transformer.set_attn_processor(PSAProcessor("psa_balanced"))` works as well: diffusers puts the one object on
    every attention of the denoiser; at the first forward it finds out which denoiser that is, makes the video
    self-attentions sparse and leaves every other attention as diffusers would have it. The denoising step then comes
    from the denoiser's `timestep`, one scalar read per forward if the preset has warm-up steps or `refresh_every`;
    `enable_psa`, which hears of the steps from the pipeline, needs none. To take it back, set the processors you want
    instead.

    One object on the two experts of Wan 2.2 shares one clock, as it should; use different objects for different
    pipelines. Without its pipeline a text-to-video expert looks like Wan 2.1 14B and gets its presets: hand over
    `load_preset("Wan2.2_A14B")` instead of a name.

    Args:
        preset: Name of a preset, a `PSAPreset`, or None for the default of the model.
        config: Path of a YAML with presets of your own.
        report: Whether to record what runs, for `psa_report`.
        **overrides: Preset fields by their YAML names, for example `warmup_steps=0`.

    Raises:
        TypeError: If `preset` is something else.
        ValueError: If no model has a preset of that name, or an override is wrong.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(
        self,
        preset: str | PSAPreset | None = None,
        *,
        config: str | Path | None = None,
        report: bool = False,
        **overrides: Any,
    ) -> None:
        _check_choice(preset, config, overrides)
        self.preset = preset
        self.config = config
        self.report = report
        self.overrides = overrides
        self._runs: dict[PSAPreset, Run] = {}
        self._processors: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
        self._num_denoisers = 0

    @property
    def psa_recorders(self) -> list[Recorder]:
        """Recorders of the denoisers served, for `psa_report`."""
        return [run.recorder for run in self._runs.values() if run.recorder is not None]

    def __call__(self, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        processor = self._processors.get(attn)
        if processor is None:
            processor = self._bind(attn)
        for name in ("_attention_backend", "_parallel_config"):
            value = getattr(self, name)
            if value is not None and getattr(processor, name, value) != value:
                setattr(processor, name, value)
        return processor(attn, *args, **kwargs)

    # diffusers hands over only the arguments that a signature names: these are the names of all families
    __call__.__signature__ = inspect.Signature(
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", "attn", *_ARGUMENTS)
    )

    @torch.compiler.disable  # once a denoiser; it walks the Python stack
    def _bind(self, attn: nn.Module) -> Any:
        """Make the processors of the denoiser that is running, and listen to its forwards from now on."""
        denoiser, args, kwargs = _running_denoiser(attn)
        family = find_family(denoiser)
        preset, title = resolve_preset(self.preset, self.config, self.overrides, family=family, denoiser=denoiser)
        run = self._runs.get(preset) or self._runs.setdefault(preset, Run(preset, title, report=self.report))
        self._num_denoisers += 1
        suffix = "" if self._num_denoisers == 1 else f" {self._num_denoisers}"
        site = Site(type(denoiser).__name__ + suffix, denoiser, family, run)

        ours = [part for part in denoiser.modules() if getattr(part, "processor", None) is self]
        paths = {part: path for path, part in attention_paths(denoiser).items()}
        sparse = family.self_attentions(denoiser)
        for part in ours:
            path = paths[part]
            original = family.default_processor(denoiser, path, part)
            self._processors[part] = family.processor(path, original, site) if path in sparse else original

        home = weakref.ref(denoiser)

        def before_forward(denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if home() is not denoiser:
                return  # a deep copy has our hook, but processors of its own
            if any(part.processor is self for part in ours):
                site.before_forward(denoiser, args, kwargs)
                return
            handle.remove()  # the user has set other processors since
            run.kept.clear()
            for part in ours:
                self._processors.pop(part, None)

        handle = denoiser.register_forward_pre_hook(before_forward, with_kwargs=True)
        before_forward(denoiser, args, kwargs)
        logger.info("%s, in the self-attentions of %s", title, site.name)
        return self._processors[attn]


def _check_choice(preset: str | PSAPreset | None, config: str | Path | None, overrides: Mapping[str, Any]) -> None:
    """Refuse now what could not work for any model, rather than in the middle of a forward."""
    if isinstance(preset, PSAPreset):
        preset.replace(**overrides)
        return
    if preset is not None and not isinstance(preset, str):
        raise TypeError(_WRONG_KIND.format(type(preset).__name__))
    by_section = list_presets(config=config)
    section = "default"
    if preset is not None:
        sections = [section for section, names in by_section.items() if preset.casefold() in map(str.casefold, names)]
        if not sections:
            names = ", ".join(sorted({name for names in by_section.values() for name in names}))
            raise ValueError(f"no model has a preset {preset!r}. Available: {names}")
        section = sections[0]
    load_preset(section, preset, config=config, **overrides)


def _running_denoiser(attn: nn.Module) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Find, up the stack, the forward of the denoiser that `attn` is running in, and the inputs of that forward."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            module = unwrap(frame.f_locals["self"])
            if find_family(module) is not None and any(part is attn for part in module.modules()):
                return module, frame.f_locals["args"], frame.f_locals["kwargs"]
        frame = frame.f_back
    raise RuntimeError(
        f"a PSAProcessor was called by a {type(attn).__name__}, but no denoiser that PSA knows is running on the "
        f"Python stack. Use enable_psa(pipe) instead, which is told the denoiser. {supported()}"
    )
