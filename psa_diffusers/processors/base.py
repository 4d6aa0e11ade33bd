"""Base of the families' processors: dense or sparse, decided, run and noted in one place."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from psa_diffusers.ops.checks import unsupported_head_dim
from psa_diffusers.pipelines.host import same
from psa_diffusers.processors import ulysses
from psa_diffusers.processors.dense import fastest_dense
from psa_diffusers.processors.recorder import Measured, Recorder
from psa_diffusers.processors.sparse import SparseCalls

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

TEXT_ARGUMENTS = ("hidden_states", "encoder_hidden_states", "attention_mask", "image_rotary_emb")
"""What most attentions are called with: see `FamilyProcessor.arguments`."""

Projected = tuple[Tensor, Tensor, Tensor]
"""q, k and v ``[B, H, L, D]``, normed and rotated."""


class FamilyProcessor(SparseCalls):
    """An attention processor that runs a self-attention sparse, or hands the call to the processor it replaces.

    What happens in a call stands here, once: find out why it must be dense, if it must; else project, attend, put out.
    A family says in `arguments` what its attentions are called with, and overrides `project`, and where they differ
    `attend` and `put_out`. It may instead bring a `__call__` of its own, made of `why_dense`, `dense` and `sparse`.

    A plain object, never a module: weights, `state_dict`, `.to`, offload and LoRA do not notice.

    Attributes:
        arguments: Names of what the attention hands over, in the order of the upstream processor, `hidden_states` (the
            video tokens) first. All of them: diffusers drops what a signature does not name.
        text_in_sequence: Whether `encoder_hidden_states` are tokens of the same sequence. Otherwise a call with them is
            a cross-attention.
        has_context: Whether other tokens (history, keyframes) may stand among the video tokens. Like text, they read,
            and are read, in full.
        masks_padding: Whether `attention_mask` hides the padding of the text and nothing else. Padding is left out, so
            the mask is not needed.
    """

    arguments: ClassVar[tuple[str, ...]] = ()
    text_in_sequence: ClassVar[bool] = False
    masks_padding: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "arguments" in vars(cls):
            cls.__call__ = _call_with(cls.arguments)  # type: ignore[method-assign]

    @property
    def recorders(self) -> list[Recorder]:
        """Where the run notes its calls, if it does."""
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

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or a pickle, is the processor that was found here: a copied denoiser has no switch and runs dense."""
        return same, (self.original,)

    def process(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """Run one call of the attention.

        Args:
            attn: The attention module.
            *args: What it handed over, as `arguments` names it.
            **kwargs: The same by name.

        Returns:
            What the upstream processor returns.
        """
        given = {**dict(zip(self.arguments, args)), **kwargs}  # noqa: B905 - fewer positional arguments than names
        video, text = given["hidden_states"], given.get("encoder_hidden_states")
        mask = None if self.masks_padding else given.get("attention_mask")
        reason = self.why_dense(attn, video, mask, context=self.has_context)
        if text is not None and not self.text_in_sequence:
            reason = "cross-attention"
        reason = reason or self.why_not(given)
        if reason:
            tokens = video.shape[1] + (text.shape[1] if text is not None and self.text_in_sequence else 0)
            return self.dense(reason, tokens, attn, *args, **kwargs)
        q, k, v = self.project(attn, given)
        out = self.attend(q, k, v, given)
        return self.put_out(attn, out.to(q.dtype), given)

    def project(self, attn: Any, given: Mapping[str, Any]) -> Projected:
        """Return q, k, v ``[B, H, L, D]`` of the whole sequence, as upstream makes them. Views are fine.

        Args:
            attn: The attention module. Projections are called as modules: LoRA, offload and quantisation want that.
            given: What it handed over, by name.
        """
        raise NotImplementedError(f"{type(self).__name__} must say how its attention projects")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, given: Mapping[str, Any]) -> Tensor:
        """Return the attention's output ``[B, H, L, D]``. Text and context are taken to stand where the family says."""
        text = given["encoder_hidden_states"].shape[1] if self.text_in_sequence else 0
        context = self.context_tokens(given["hidden_states"]) if self.has_context else 0
        first = self.site.context
        if first is None or first == (context if self.site.family.text_first else 0):
            return self.sparse(q, k, v, text_tokens=text + context)
        # the grid begins somewhere between: what stands behind it comes in front, or the other way round
        length = q.shape[2]
        turn = length - context + first if self.site.family.text_first else first
        out = self.sparse(*(x.roll(-turn, 2) for x in (q, k, v)), text_tokens=text + context)
        return out.roll(turn, 2)

    def put_out(self, attn: Any, out: Tensor, given: Mapping[str, Any]) -> Any:
        """Return what the upstream processor returns, from the output ``[B, H, L, D]`` of the attention."""
        return project_out(attn, out)

    def why_not(self, given: Mapping[str, Any]) -> str:
        """Say why this family must run such a call dense; empty if it need not."""
        return ""

    def why_dense(self, attn: Any, hidden_states: Tensor, attention_mask: Any, *, context: bool = False) -> str:
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
        if not site.is_running:
            return (
                "no forward of its denoiser is running: call the denoiser, not its forward, and give every denoiser "
                "processors of its own"
            )
        if site.dense:
            return site.dense
        if _scores_are_skipped(attn):
            return "perturbed attention guidance replaces its attention"
        if attention_mask is not None:
            return "an attention mask is in use"
        parallel = ulysses.context_parallel(self.original)
        if parallel is not None and (reason := ulysses.why_not(parallel, site.has_parallel_plan)):
            return reason
        if site.sizes is None:
            return "the inputs of the denoiser do not tell the token grid"
        if not self._is_one_graph() and (reason := self._why_not_on_grid(hidden_states, context)):
            return reason
        if hidden_states.dtype not in DTYPES:
            return f"the dtype {hidden_states.dtype} is not supported"
        if site.family.read_text is not None:
            if site.text_lengths is None:
                return "the padding of the text is not at its end"
            if len(site.text_lengths) != len(hidden_states):
                return "something between the denoiser and its layers has changed the batch"
        return unsupported_head_dim(self.head_dim(attn)) or ""

    def _why_not_on_grid(self, hidden_states: Tensor, context: bool) -> str:
        frames, height, width = self._grid()
        expected = frames * height * width
        parallel = ulysses.context_parallel(self.original)
        if parallel is not None:
            expected, context = ulysses.local_tokens(parallel, expected), False
        tokens = hidden_states.shape[1]
        if tokens != expected and not (context and self.context_tokens(hidden_states)):
            return f"{tokens} video tokens do not fill the grid {frames} x {height} x {width}"
        # a grid found by its positions; one read from the shape of the latents is sure, however much context there is
        if self.site.context is not None and 2 * expected < tokens:
            return f"the grid {frames} x {height} x {width} is less than half of the {tokens} video tokens"
        return ""

    def head_dim(self, attn: Any) -> int:
        """Return the channels of a head."""
        return int(attn.inner_dim // attn.heads)

    def context_tokens(self, hidden_states: Tensor) -> int:
        """Return how many of the tokens ``[B, S, C]`` are beyond the grid; 0 if they do not even fill it."""
        frames, height, width = self._grid()
        return max(hidden_states.shape[1] - frames * height * width, 0)

    def dense(self, reason: str, tokens: int, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the original processor with exactly the arguments that came.

        Args:
            reason: Why.
            tokens: Tokens of the sequence, for the report.
            attn: The attention module.
            *args: What it handed over.
            **kwargs: The same by name.
        """
        if self.tap is not None:
            return self.tap.left_out(reason, self.layer)
        run = self.site.run
        if not run.is_on:
            return self.original(attn, *args, **kwargs)
        if not torch.compiler.is_compiling():
            run.count_dense(reason)
        if run.recorder is not None:
            self._note("dense", Measured(reason), tokens, self.site.grid)
        if not self.site.dense and self.preset.type != "dense":
            run.say(reason, self.layer)
        with fastest_dense(args[0] if args else kwargs["hidden_states"]):
            return self.original(attn, *args, **kwargs)


def project_out(attn: Any, out: Tensor) -> Tensor:
    """Heads ``[B, H, L, D]`` side by side, through the output projection and its dropout: ``[B, L, C]``."""
    projected: Tensor = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
    return projected


def split_heads(tokens: Tensor, heads: int, *projections: nn.Module) -> list[Tensor]:
    """Project tokens ``[B, L, C]`` and split the channels into heads: ``[B, L, H, D]`` each."""
    return [project(tokens).unflatten(2, (heads, -1)) for project in projections]


def _call_with(arguments: tuple[str, ...]) -> Any:
    """Return a `__call__` whose signature names the arguments."""

    def __call__(self: FamilyProcessor, attn: Any, *args: Any, **kwargs: Any) -> Any:
        if self.site.bound_in is None or self.site.is_running:
            return self.process(attn, *args, **kwargs)
        with self.site.as_bound():
            return self.process(attn, *args, **kwargs)

    __call__.__signature__ = signature_of(arguments)  # type: ignore[attr-defined]
    return __call__


def signature_of(arguments: tuple[str, ...]) -> inspect.Signature:
    """Return the signature of a processor's `__call__` that takes these, which is all that diffusers hands over."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = [inspect.Parameter(name, kind) for name in ("self", "attn", *arguments[:1])]
    return inspect.Signature(names + [inspect.Parameter(name, kind, default=None) for name in arguments[1:]])


def _scores_are_skipped(attn: Any) -> bool:
    """Return whether a hook of diffusers has torch's attention return the values, which only the original calls."""
    hooks = getattr(getattr(attn, "_diffusers_hook", None), "hooks", None) or {}
    return any(getattr(hook, "skip_attention_scores", False) for hook in hooks.values())
