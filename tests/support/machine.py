"""Sequences of operations on real small pipelines, each compared with what a model of ours says must happen."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import pickle
import re
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import accelerate
import diffusers
import machine_model as model
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from machine_pipelines import KINDS, WRONG, Choice, Kind, add_adapter, reference
from watch import Watch

from psa_diffusers.pipelines import host
from psa_diffusers.pipelines.enable import disable_psa, enable_psa
from psa_diffusers.pipelines.report import psa_report
from psa_diffusers.processors.base import FamilyProcessor
from psa_diffusers.processors.standalone import PSAProcessor

CPU = torch.device("cpu")
MOST_PIPELINES, MOST_DENOISERS = 3, 5

_which = st.integers(0, 5)
_steps = st.sampled_from((1, 2, 3, 5))


class Broken(Exception):
    """Raised in the middle of a call."""


class Machine(RuleBasedStateMachine):
    """Pipelines of one kind that share, lose and exchange their denoisers.

    Args:
        watch: Sees what self-attentions do.
        choices: What can be enabled.
        done: Counts operations and calls over all sequences.
    """

    def __init__(self, watch: Watch, choices: tuple[Choice, ...], done: Counter[str]) -> None:
        super().__init__()
        self.watch = watch
        self.choices = choices
        self.done = done
        self.world = model.World()
        self.has_compiled = False
        self.warnings = _Warnings()
        logging.getLogger("psa_diffusers").addHandler(self.warnings)
        done["sequences"] += 1

    def teardown(self) -> None:
        try:
            for pipe in self.world.pipelines if sys.exc_info()[0] is None else ():
                self._call(pipe, steps=3, guided=False)
        finally:
            self._clean_up()

    def _clean_up(self) -> None:
        logging.getLogger("psa_diffusers").removeHandler(self.warnings)
        self.watch.forget()
        if self.has_compiled:
            torch._dynamo.reset()

    # beginnings

    @initialize(kind=st.sampled_from(KINDS))
    def begin(self, kind: Kind) -> None:
        self.kind = kind
        for seed in range(len(kind.parts) + 1):
            self._add_denoiser(kind.denoiser(seed), seed)
        self._build()

    # switching

    @rule(which=_which, number=_which)
    def enable(self, which: int, number: int) -> None:
        pipe, choice = self._pipe(which), self._choice(number)
        self._do("enable", lambda: enable_psa(pipe.real, **choice.arguments), lambda: self.world.enable(pipe, choice))

    @rule(which=_which, wrong=st.sampled_from(WRONG))
    def enable_what_is_not(self, which: int, wrong: dict[str, Any]) -> None:
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            enable_psa(self._pipe(which).real, **wrong)
        self.done["operations"] += 1

    @rule(which=_which)
    def disable(self, which: int) -> None:
        pipe = self._pipe(which)
        self._do("disable", lambda: disable_psa(pipe.real), lambda: self.world.disable(pipe))

    @rule(which=_which, number=_which)
    def set_standalone(self, which: int, number: int) -> None:
        pipe, choice = self._pipe(which), self._choice(number)
        processor = PSAProcessor(**choice.arguments)
        for part in pipe.parts.values():
            part.module.set_attn_processor(processor)
            part.originals = {}
        self._do("standalone", None, lambda: self.world.set_standalone(list(pipe.parts.values()), choice))

    @rule(which=_which, number=_which)
    def set_on_pipeline(self, which: int, number: int) -> None:
        pipe, choice = self._pipe(which), self._choice(number)
        processor = PSAProcessor(**choice.arguments)
        self._do("enable", lambda: pipe.real.set_attn_processor(processor), lambda: self.world.enable(pipe, choice))

    @rule(which=_which)
    def set_default(self, which: int) -> None:
        part = self._pipe(which).parts["transformer"]
        default = type(self._attentions(self.kind.denoiser(0))[0][1].processor)
        part.module.set_attn_processor(default())
        part.originals = {path: attention.processor for path, attention in self._attentions(part.module)}
        self._do("default", None, lambda: self.world.set_default(part))

    # running

    @rule(which=_which, steps=_steps, guided=st.sampled_from((False, False, False, True)))
    def call(self, which: int, steps: int, guided: bool) -> None:
        self._call(self._pipe(which), steps, guided)

    @rule(steps=_steps)
    def call_all(self, steps: int) -> None:
        for pipe in list(self.world.pipelines):
            self._call(pipe, steps, guided=False)

    @rule(
        which=_which,
        steps=st.sampled_from((2, 3, 5)),
        at=st.integers(0, 4),
        how=st.sampled_from(("callback", "forward", "interrupt", "disable", "enable")),
    )
    def call_with_an_event(self, which: int, steps: int, at: int, how: str) -> None:
        pipe = self._pipe(which)
        if how == "forward" and any(part.is_compiled for part in pipe.parts.values()):
            how = "callback"
        self._call(pipe, steps, False, event=how, at=at % steps)

    @rule(which=_which, timestep=st.sampled_from((900.0, 500.0, 100.0)))
    def forward(self, which: int, timestep: float) -> None:
        denoiser = self.world.denoisers[which % len(self.world.denoisers)]
        with self._seeing([denoiser]) as forwards:
            self.kind.forward(denoiser.module, timestep)
        expected = self.world.forward(denoiser, timestep)
        if not denoiser.is_compiled:
            assert forwards() == [(denoiser, _kinds(expected.layers))]
        self._check_records(with_kept=False)
        self.done["operations"] += 1
        self.done["forwards"] += 1

    # exchanging, copying

    @rule(which=_which, part=_which, denoiser=_which)
    def swap(self, which: int, part: int, denoiser: int) -> None:
        pipe, new = self._pipe(which), self.world.denoisers[denoiser % len(self.world.denoisers)]
        name = self.kind.parts[part % len(self.kind.parts)]
        if new in pipe.parts.values():
            return
        setattr(pipe.real, name, new.module)
        pipe.parts[name] = new
        self.done["operations"] += 1

    @precondition(lambda self: len(self.world.denoisers) < MOST_DENOISERS)
    @rule(which=_which)
    def copy_denoiser(self, which: int) -> None:
        old = self.world.denoisers[which % len(self.world.denoisers)]
        if old.is_compiled or old.offload:
            return
        new = self._add_denoiser(copy.deepcopy(old.module), old.seed, old.has_adapter)
        if old.switch is not None and old.switch.is_standalone:
            new.switch, new.originals = model.Switch(old.switch.choice, is_standalone=True), {}
        self.done["operations"] += 1

    @precondition(lambda self: len(self.world.pipelines) < MOST_PIPELINES)
    @precondition(lambda self: len(self.world.denoisers) < MOST_DENOISERS)
    @rule(which=_which, how=st.sampled_from((copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe)))))
    def copy_pipeline(self, which: int, how: Callable[[Any], Any]) -> None:
        pipe = self._pipe(which)
        if any(part.is_compiled or part.offload for part in pipe.parts.values()):
            return
        switch, switches = self.world.copy(pipe)
        real = how(pipe.real)
        parts = {}
        for name, old in pipe.parts.items():
            parts[name] = self._add_denoiser(getattr(real, name), old.seed, old.has_adapter)
            parts[name].switch = switches[name]
            if switches[name] is not None:
                parts[name].originals = {}
        self.world.pipelines.append(model.Pipeline(real, self.kind, pipe.cls, parts, switch))
        self.done["operations"] += 1

    @precondition(lambda self: len(self.world.pipelines) < MOST_PIPELINES)
    @rule(which=_which, is_other=st.booleans())
    def share(self, which: int, is_other: bool) -> None:
        pipe = self._pipe(which)
        if any(part.offload for part in pipe.parts.values()):
            return
        cls = getattr(diffusers, self.kind.sibling) if is_other else pipe.cls
        if is_other and pipe.cls is cls:
            cls = getattr(diffusers, self.kind.cls)
        real = cls.from_pipe(pipe.real)
        real.set_progress_bar_config(disable=True)
        assert type(real) is cls
        self.world.pipelines.append(model.Pipeline(real, self.kind, cls, dict(pipe.parts)))
        self.done["operations"] += 1

    @rule(which=_which)
    def delete(self, which: int) -> None:
        pipe = self._pipe(which)
        self.world.delete(pipe)
        gone, pipe.real = weakref.ref(pipe.real), None
        gc.collect()
        assert gone() is None, "a deleted pipeline is alive"
        if not self.world.pipelines:
            self._build()
        self.done["operations"] += 1

    # what others do

    @rule(which=_which, how=st.sampled_from(("regional", "whole")), sure=st.integers(0, 5))
    def compile(self, which: int, how: str, sure: int) -> None:
        pipe = self._pipe(which)
        part = pipe.parts["transformer"]
        if sure or part.is_compiled or part.offload:
            return
        self.has_compiled = part.is_compiled = True
        if how == "whole":
            pipe.real.transformer = torch.compile(part.module, backend="eager")
        else:
            for path, _ in self._attentions(part.module):
                part.module.get_submodule(path.rpartition(".")[0]).compile(backend="eager")
        self.done["operations"] += 1

    @rule(which=_which, how=st.sampled_from(("accelerate", "group", "model")))
    def offload(self, which: int, how: str) -> None:
        pipe = self._pipe(which)
        if any(part.is_compiled or part.offload for part in pipe.parts.values()):
            return
        for part in pipe.parts.values():
            part.offload = how
            if how == "accelerate":
                accelerate.cpu_offload(part.module, CPU, offload_buffers=True)
            elif how == "group":
                part.module.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")
        if how == "model":
            pipe.real.enable_model_cpu_offload(device="cpu")
        self.done["operations"] += 1

    @rule(which=_which)
    def no_offload(self, which: int) -> None:
        for part in self._pipe(which).parts.values():
            if part.offload in ("accelerate", "model"):
                accelerate.hooks.remove_hook_from_module(part.module, recurse=True)
                part.offload = ""
        self.done["operations"] += 1

    @rule(which=_which)
    def adapt(self, which: int) -> None:
        pipe = self._pipe(which)
        part = pipe.parts["transformer"]
        if any(each.is_compiled or each.offload for each in pipe.parts.values()):
            return
        if part.has_adapter:
            pipe.real.unload_lora_weights()
            for each in pipe.parts.values():
                each.has_adapter = False
        else:
            add_adapter(self.kind, part.module)
            part.has_adapter = True
        self.done["operations"] += 1

    # what must always hold

    @invariant()
    def processors_are_where_they_must_be(self) -> None:
        for denoiser in self.world.denoisers:
            kinds = set()
            for path, attention in self._attentions(denoiser.module):
                processor = attention.processor
                kinds.add(_owner(processor))
                if denoiser.switch is None and path in denoiser.originals:
                    assert processor is denoiser.originals[path], "another processor than the one that was found"
            expected = "" if denoiser.switch is None else "standalone" if denoiser.switch.is_standalone else "pipeline"
            assert kinds == {expected}
            if denoiser.switch is None and denoiser.left is None and not denoiser.past:
                assert not _hooks(denoiser.module), "hooks of ours on a denoiser that has nothing of ours"

    @invariant()
    def classes_are_those_of_the_pipelines(self) -> None:
        for pipe in self.world.pipelines:
            cls = type(pipe.real)
            assert cls.__name__ == pipe.cls.__name__
            if self.world.listeners(pipe):
                assert cls is not pipe.cls
                assert issubclass(cls, pipe.cls)
            else:
                assert cls is pipe.cls, "a class of ours on a pipeline that nobody listens to"

    # helpers

    def _pipe(self, which: int) -> model.Pipeline:
        return self.world.pipelines[which % len(self.world.pipelines)]

    def _choice(self, number: int) -> Choice:
        return self.choices[number % len(self.choices)]

    def _add_denoiser(self, module: Any, seed: int, has_adapter: bool = False) -> model.Denoiser:
        denoiser = model.Denoiser(module, seed, has_adapter)
        denoiser.originals = {path: attention.processor for path, attention in self._attentions(module)}
        self.world.denoisers.append(denoiser)
        return denoiser

    def _build(self) -> None:
        parts = dict(zip(self.kind.parts, self.world.denoisers, strict=False))
        real = self.kind.pipeline({name: part.module for name, part in parts.items()})
        self.world.pipelines.append(model.Pipeline(real, self.kind, type(real), parts))

    def _attentions(self, module: Any) -> list[tuple[str, Any]]:
        return [(path, part) for path, part in module.named_modules() if re.fullmatch(self.kind.attentions, path)]

    def _do(self, name: str, real: Callable[[], Any] | None, believed: Callable[[], None]) -> None:
        """Do an operation that may have to be refused."""
        self.done["operations"] += 1
        try:
            believed()
        except model.Refused:
            assert real is not None
            with pytest.raises(RuntimeError, match="PSA processors already"):
                real()
            return
        if real is not None:
            real()

    @contextlib.contextmanager
    def _seeing(self, denoisers: list[model.Denoiser]) -> Any:
        """See what denoisers do. Yields what gives each forward: denoiser and kinds of its self-attentions."""
        begun: list[tuple[model.Denoiser, int]] = []
        self.watch.forget()
        hooks = []
        for denoiser in denoisers:
            if not denoiser.is_compiled:

                def note(*_: Any, denoiser: model.Denoiser = denoiser) -> None:
                    begun.append((denoiser, len(self.watch.calls)))

                hooks.append(self.watch.denoiser(denoiser.module, self.kind.attentions))
                hooks.append(denoiser.module.register_forward_pre_hook(note))

        def forwards() -> list[tuple[model.Denoiser, list[str]]]:
            ends = [place for _, place in begun[1:]] + [len(self.watch.calls)]
            kinds = [kind for _, kind in self.watch.calls]
            return [(denoiser, kinds[place:end]) for (denoiser, place), end in zip(begun, ends, strict=True)]

        try:
            yield forwards
        finally:
            for hook in hooks:
                hook.remove()

    def _call(self, pipe: model.Pipeline, steps: int, guided: bool, event: str = "", at: int = 0) -> None:
        parts = list(pipe.parts.values())
        passes = self.kind.passes if guided else 1
        is_seen = not any(part.is_compiled for part in parts)
        self.warnings.clear()
        started = time.perf_counter()
        with self._seeing(parts) as forwards:
            latents = self._run(pipe, steps, guided, event, at)
        self.done["milliseconds"] += int(1000 * (time.perf_counter() - started))
        expected = self._expect(pipe, steps, passes, event, at)
        if is_seen:
            assert forwards() == [(each.denoiser, _kinds(each.layers)) for each in expected]
        self._check_records(with_kept=is_seen)
        if not event:
            is_sparse = any(any(each.layers) for each in expected)
            self._check_latents(pipe, latents, steps, guided, is_sparse)
            used = {each.denoiser.switch for each in expected}
            if is_seen and used == {pipe.switch} != {None} and not is_sparse and not pipe.switch.choice.is_dense:
                assert sum("nothing" in message for message in self.warnings.messages) == 1
        self.done["operations"] += 1
        self.done["calls"] += 1
        self.done["self-attentions"] += sum(len(each.layers) for each in expected)

    def _run(self, pipe: model.Pipeline, steps: int, guided: bool, event: str, at: int) -> torch.Tensor | None:
        if not event:
            return self.kind.run(pipe.real, steps, guided)

        def callback(real: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            if index == at and event == "callback":
                raise Broken
            if index == at and event == "interrupt":
                real._interrupt = True
            if index == at and event == "disable":
                disable_psa(real)
            if index == at and event == "enable":
                with pytest.raises(RuntimeError):
                    enable_psa(real)
            return kwargs

        if event == "forward":
            with self._breaking(pipe, at), pytest.raises(Broken):
                self.kind.run(pipe.real, steps, guided)
        elif event == "callback":
            with pytest.raises(Broken):
                self.kind.run(pipe.real, steps, guided, callback_on_step_end=callback)
        else:
            self.kind.run(pipe.real, steps, guided, callback_on_step_end=callback)
        return None

    @contextlib.contextmanager
    def _breaking(self, pipe: model.Pipeline, at: int) -> Any:
        """Raise in the last layer of the forward of a step."""
        count = Counter[str]()

        def hook(*_: Any) -> None:
            count["forwards"] += 1
            if count["forwards"] == at + 1:
                raise Broken

        hooks = [self._attentions(part.module)[-1][1].register_forward_pre_hook(hook) for part in pipe.parts.values()]
        try:
            yield
        finally:
            for each in hooks:
                each.remove()

    def _expect(self, pipe: model.Pipeline, steps: int, passes: int, event: str, at: int) -> list[model.Forward]:
        """What the model says of a call that has run."""
        boundary = self.kind.boundary
        timesteps = pipe.real.scheduler.timesteps.tolist()
        names = ["transformer" if boundary is None or t >= boundary * 1000 else "transformer_2" for t in timesteps]
        self.world.begin(pipe)
        expected: list[model.Forward] = []
        for forward in self.world.forwards(pipe, steps, passes, names):
            expected.append(forward)
            if forward.step < at or not event:
                continue
            if event == "forward":
                if forward.denoiser.switch is not None:
                    forward.denoiser.switch.records.pop()
                forward.layers.pop()
            if event in ("forward", "callback", "interrupt"):
                break
            if event == "disable" and forward.step == at:
                self.world.disable(pipe)
        return expected

    def _check_records(self, *, with_kept: bool) -> None:
        """Compare each report with what the model has noted."""
        for pipe in self.world.pipelines:
            switches = {part.switch for part in pipe.parts.values()}
            switch = pipe.switch
            if switch is None and len(switches) == 1:
                (switch,) = switches
            if switch is None:
                with contextlib.suppress(RuntimeError):
                    assert not psa_report(pipe.real).records or len(switches) > 1
                continue
            if not switch.choice.report:
                continue
            if switch.is_standalone and not switch.records:
                continue  # not bound yet
            places = [path for path, _ in self._attentions(next(iter(pipe.parts.values())).module)]
            found = [
                (each["step"], places.index(each["layer"]), each["kind"], each["kept"] and with_kept)
                for each in psa_report(pipe.real).records
            ]
            assert found == [(*rest, kept and with_kept) for *rest, kept in switch.records]

    def _check_latents(self, pipe: model.Pipeline, latents: Any, steps: int, guided: bool, is_sparse: bool) -> None:
        """Compare with pipelines that nothing has happened to: without PSA to the bit, with it likewise."""
        parts = list(pipe.parts.values())
        weights = tuple((part.seed, part.has_adapter) for part in parts)
        dense = reference(self.kind, pipe.cls.__name__, weights, None, steps, guided)
        is_compiled = any(part.is_compiled for part in parts)
        if not is_sparse:
            assert _are_equal(latents, dense, is_compiled), "a dense call gives something else"
            return
        assert not _are_equal(latents, dense, is_compiled), "a sparse call gives what a dense one does"
        chosen = {None if part.switch is None else part.switch.choice for part in parts}
        if len(chosen) == 1 and not (is_compiled and any(choice.refresh > 1 for choice in chosen if choice)):
            sparse = reference(self.kind, pipe.cls.__name__, weights, chosen.pop(), steps, guided)
            assert _are_equal(latents, sparse, is_compiled), "a sparse call gives something else than a fresh pipeline"


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def clear(self) -> None:
        self.messages.clear()


def _kinds(layers: list[bool]) -> list[str]:
    return ["sparse" if is_sparse else "dense" for is_sparse in layers]


def _owner(processor: Any) -> str:
    if isinstance(processor, PSAProcessor):
        return "standalone"
    return "pipeline" if isinstance(processor, FamilyProcessor) else ""


def _hooks(module: Any) -> list[Any]:
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return [hook for hook in hooks if isinstance(hook, host._Hook)]


def _are_equal(one: torch.Tensor, other: torch.Tensor, to_rounding: bool) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5) if to_rounding else torch.equal(one, other)
