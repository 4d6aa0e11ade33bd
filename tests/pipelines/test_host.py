"""The tricks that are played on diffusers and torch: each does one thing, and is undone."""

import copy
import pickle

import pytest
import tiny
import torch
from tiny import CASES
from torch import nn

from psa_diffusers.pipelines import host


class Pipe:
    """As much of a pipeline as these tricks see."""

    def __call__(self, inside=lambda pipe: None):
        return inside(self)

    def say(self):
        return "below"


def pushed(pipe, name):
    cls = type(pipe)
    return host.push_subclass(pipe, {"say": lambda self: f"{name} on {cls.say(self)}"})


# subclasses


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("second", [0, 1])
def test_subclasses_are_popped_in_any_order(first, second):
    pipe = Pipe()
    subclasses = [pushed(pipe, name) for name in "abc"]
    assert pipe.say() == "c on b on a on below"
    for index in (first, second, 0):
        assert type(pipe) is not Pipe
        host.pop_subclass(pipe, subclasses.pop(index))
    assert type(pipe) is Pipe
    assert vars(pipe) == {}


def test_a_method_that_somebody_else_has_put_there_stays():
    pipe = Pipe()
    subclass = pushed(pipe, "a")
    type(pipe).say = lambda self: "theirs"
    host.pop_subclass(pipe, subclass)
    assert pipe.say() == "theirs"


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_copies_are_of_the_pipelines_own_class(make):
    pipe = Pipe()
    pipe.name = ["a video"]
    pushed(pipe, "a")
    other = make(pipe)
    assert type(other) is Pipe
    assert vars(other) == {"name": ["a video"]}
    assert pipe.say() == "a on below"


def test_a_pipeline_is_running_from_its_first_line_to_its_last():
    pipe, other = Pipe(), Pipe()
    assert pipe(host.is_running)
    assert not pipe(lambda _: host.is_running(other))
    assert not host.is_running(pipe)


# modules


class Wrapper(nn.Module):
    """A module that holds others under given names."""

    def __init__(self, weight=False, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        if weight:
            self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, *args, **kwargs):
        return next(iter(self.children()))(*args, **kwargs)


@pytest.mark.parametrize("name", ["module", "model", "base_model", "_orig_mod", "_fsdp_wrapped_module"])
def test_what_holds_nothing_but_a_module_is_a_wrapper(name):
    inside = nn.Linear(1, 1)
    assert host.unwrap(Wrapper(**{name: inside})) is inside
    assert host.unwrap(Wrapper(module=Wrapper(**{name: inside}))) is inside


@pytest.mark.parametrize(
    "module",
    [
        Wrapper(module=nn.Linear(1, 1), head=nn.Linear(1, 1)),
        Wrapper(module=nn.Linear(1, 1), weight=True),
        Wrapper(text_model=nn.Linear(1, 1)),
        nn.Sequential(nn.Linear(1, 1)),
        None,
        "a name",
    ],
    ids=["head", "weight", "text", "sequence", "none", "name"],
)
def test_what_is_more_than_its_inside_stays(module):
    assert host.unwrap(module) is module


def test_the_parts_of_a_real_pipeline_are_no_wrappers():
    for case in ("cogvideox", "wan2.1-i2v"):
        for part in CASES[case].build().components.values():
            assert host.unwrap(part) is part


def test_averaged_and_parallel_modules_of_torch_are_unwrapped():
    inside = nn.Linear(1, 1)
    assert host.unwrap(nn.DataParallel(inside)) is inside
    averaged = torch.optim.swa_utils.AveragedModel(inside)
    assert host.unwrap(averaged) is averaged.module


# hooks


class Noting:
    """Takes note of what it hears."""

    def __init__(self):
        self.heard = []

    def before(self, module, args, kwargs):
        self.heard.append("before")

    def after(self, module, args, kwargs, output):
        self.heard.append("after")


def test_hooks_hear_the_end_also_of_a_forward_that_raised():
    module, noting = nn.Linear(2, 2), Noting()
    handles = host.add_hooks(module, noting.before, noting.after)
    module(torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="shapes"):
        module(torch.ones(1, 3))
    assert noting.heard == ["before", "after"] * 2
    for handle in handles * 2:
        handle.remove()
    module(torch.ones(1, 2))
    assert len(noting.heard) == 4
    assert not module._forward_pre_hooks
    assert not module._forward_hooks


@pytest.mark.parametrize("make", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copied_module_tells_nothing_to_who_listens_to_the_original(make):
    module, noting = nn.Linear(2, 2), Noting()
    host.add_hooks(module, noting.before, noting.after)
    make(module)(torch.ones(1, 2))
    assert noting.heard == []
    module(torch.ones(1, 2))
    assert noting.heard == ["before", "after"]


def test_checkpointing_is_wrapped_only_while_it_is_on_and_is_given_back():
    denoiser = tiny.wan_transformer()
    assert host.wrap_checkpointing(denoiser, None) is None
    denoiser.enable_gradient_checkpointing()
    theirs = denoiser._gradient_checkpointing_func
    handle = host.wrap_checkpointing(denoiser, None)
    assert denoiser._gradient_checkpointing_func is not theirs
    assert host.wrap_checkpointing(denoiser, None) is None, "once is enough"
    assert copy.deepcopy(denoiser)._gradient_checkpointing_func is theirs
    handle.remove()
    assert denoiser._gradient_checkpointing_func is theirs


def test_a_backward_knows_that_it_is_one():
    seen = []
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda _: seen.append(host.in_backward()))
    (2 * x).backward()
    assert seen == [True]
    assert not host.in_backward()


def test_the_innermost_module_that_is_wanted_is_found():
    seen = []

    class Inside(nn.Module):
        def forward(self, x, scale=1):
            seen.append(host.running_module(lambda module: isinstance(module, Inside)))
            return x

    inside = Inside()
    Wrapper(module=Wrapper(module=inside))(1, scale=2)
    assert seen == [(inside, (1,), {"scale": 2})]
    assert host.running_module(lambda module: True) is None
