"""Denoisers that are exchanged, copied, pickled or wrapped while PSA is on, and what users put on them themselves."""

import copy
import functools
import io
import pickle

import peft
import pytest
import tiny
import torch
from guests import attentions, enable, forwards_due, forwards_told
from tiny import CASES, TINY_PRESET

from psa_diffusers.pipelines import host
from psa_diffusers.pipelines.enable import disable_psa, enable_psa
from psa_diffusers.pipelines.report import psa_report
from psa_diffusers.pipelines.state import state_of
from psa_diffusers.presets import PSAPreset
from psa_diffusers.processors.base import FamilyProcessor
from psa_diffusers.processors.standalone import PSAProcessor

pytestmark = pytest.mark.usefixtures("no_gradients")
CASE = CASES["wan2.1"]
WARM = {"warmup_steps": 1, "report": True}
SMALL = (2, 4, 4)


def run(pipe):
    return CASE.run(pipe, steps=3, grid=SMALL, guidance=1.0)


@functools.cache
def expected(which):
    """What nothing but PSA, or nothing at all, gives."""
    pipe = CASE.build()
    if which == "sparse":
        enable(pipe, **WARM)
    return run(pipe)


def is_sparse(pipe):
    """Whether a call is what it is under PSA, and is told so; if not, it is one without PSA."""
    video = run(pipe)
    sparse = torch.equal(video, expected("sparse"))
    assert sparse or torch.equal(video, expected("dense"))
    if sparse:
        assert forwards_told(pipe) == forwards_due(3, 1)
    return sparse


def saved_and_loaded(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


copies = pytest.mark.parametrize("make", [copy.deepcopy, pickled, saved_and_loaded])


# exchanged


EXCHANGES = {
    "attribute": lambda pipe, new: setattr(pipe, "transformer", new),
    "register": lambda pipe, new: pipe.register_modules(transformer=new),
    "adapter": lambda pipe, new: setattr(pipe, "transformer", with_adapter(new)),
}


@pytest.mark.parametrize("how", EXCHANGES)
def test_another_denoiser_is_taken_on_and_the_old_one_let_go(how):
    pipe = enable(CASE.build(), **WARM)
    assert is_sparse(pipe)
    old, new = pipe.transformer, tiny.wan_transformer()
    EXCHANGES[how](pipe, new)
    assert is_sparse(pipe)
    assert not any(isinstance(part.processor, FamilyProcessor) for part in old.modules() if hasattr(part, "processor"))
    assert not old._forward_pre_hooks
    assert not old._forward_hooks
    other = CASE.build()
    other.transformer = old
    assert not is_sparse(other)
    disable_psa(pipe)
    assert not is_sparse(pipe)
    assert not new._forward_pre_hooks


def test_the_same_denoiser_moved_and_cast_is_no_other():
    pipe = enable(CASE.build(), **WARM)
    processors = [part.processor for _, part in attentions(pipe)]
    pipe.to(torch.bfloat16).to("cpu")
    run(pipe)
    pipe.to(torch.float32)
    run(pipe)
    assert [part.processor for _, part in attentions(pipe)] == processors
    assert len(state_of(pipe).switch.processors) == len(set(processors)) // 2  # cross-attentions stay


def test_experts_come_go_and_change_places():
    pipe = enable(tiny.wan(experts=2, pipeline={"boundary_ratio": 0.8}), **WARM)

    def denoisers():
        run(pipe)
        return {(each["denoiser"], each["kind"]) for each in psa_report(pipe).records if each["step"]}

    both = {("transformer", "sparse"), ("transformer_2", "sparse")}
    assert denoisers() == both
    second = pipe.transformer_2
    pipe.transformer_2 = tiny.wan_transformer(seed=3)
    assert denoisers() == both
    pipe.transformer, pipe.transformer_2 = pipe.transformer_2, pipe.transformer
    assert denoisers() == both
    pipe.register_to_config(boundary_ratio=None)
    pipe.transformer_2 = None
    assert denoisers() == {("transformer", "sparse")}
    pipe.register_to_config(boundary_ratio=0.8)
    pipe.transformer_2 = second
    assert denoisers() == both
    found = [pipe.transformer, pipe.transformer_2]
    disable_psa(pipe)
    assert not any(each._forward_pre_hooks for each in found)


def test_two_enabled_pipelines_that_exchange_their_denoisers_stay_sparse_and_say_so(caplog):
    pipes = [enable(CASE.build(), **WARM) for _ in range(2)]
    pipes[0].transformer, pipes[1].transformer = pipes[1].transformer, pipes[0].transformer
    for pipe in pipes:
        assert torch.equal(run(pipe), expected("sparse"))
    assert "has PSA of its own, which stays" in caplog.text
    for pipe in pipes:
        disable_psa(pipe)
    for pipe in pipes:
        assert not is_sparse(pipe)
        assert type(pipe) is type(CASE.build())
        assert not pipe.transformer._forward_pre_hooks


def test_a_denoiser_that_psa_does_not_know_is_dense_and_told_once(caplog):
    class Guess(torch.nn.Module):
        def __init__(self, inside):
            super().__init__()
            self.network = inside
            self.config, self.dtype, self.device = inside.config, inside.dtype, inside.device

        def forward(self, **kwargs):
            return self.network(**kwargs)

        def cache_context(self, *args, **kwargs):
            return self.network.cache_context(*args, **kwargs)

    pipe = enable(CASE.build(), **WARM)
    pipe.transformer = Guess(tiny.wan_transformer())
    for _ in range(2):
        assert torch.equal(run(pipe), expected("dense"))
    assert caplog.text.count("PSA does not know the new transformer, a Guess: it runs dense") == 1


# copied


@copies
def test_a_copy_of_a_pipeline_is_on_by_a_switch_of_its_own(make):
    pipe = enable(CASE.build(), **WARM)
    assert is_sparse(pipe)
    other = make(pipe)
    assert is_sparse(other)
    disable_psa(pipe)
    assert is_sparse(other)
    assert not is_sparse(pipe)
    enable(pipe, **WARM)
    disable_psa(other)
    assert is_sparse(pipe)
    assert not is_sparse(other)
    assert type(other) is type(CASE.build())


@copies
def test_a_copy_of_a_denoiser_is_off_and_is_taken_on_where_it_is_put(make):
    pipe = enable(CASE.build(), **WARM)
    assert is_sparse(pipe)
    twin, plain = make(pipe.transformer), CASE.build()
    plain.transformer = twin
    assert not is_sparse(plain)
    assert not any(isinstance(part.processor, FamilyProcessor) for _, part in attentions(plain))
    pipe.transformer = twin
    assert is_sparse(pipe)
    disable_psa(pipe)
    assert not is_sparse(pipe)


@copies
def test_a_copy_of_a_denoiser_with_a_processor_of_its_own_is_on_by_itself(make):
    pipe, other = CASE.build(), CASE.build()
    pipe.transformer.set_attn_processor(PSAProcessor(**{**TINY_PRESET, **WARM}))
    assert is_sparse(pipe)
    other.transformer = make(pipe.transformer)
    assert is_sparse(other)
    assert forwards_told(pipe) == forwards_due(3, 1)
    disable_psa(pipe)
    assert is_sparse(other)


@copies
def test_a_copy_keeps_the_choice_when_the_file_of_presets_has_gone(make, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("Wan2.1_1.3b: {attention_configs: {mine: {warmup_steps: 1}}}")
    chosen = {name: value for name, value in TINY_PRESET.items() if name != "warmup_steps"}
    pipe = enable_psa(CASE.build(), "mine", config=file, report=True, **chosen)
    file.unlink()
    other = make(pipe)
    assert torch.equal(run(other), run(pipe))
    assert forwards_told(other) == forwards_due(3, 1)


@copies
def test_a_copy_of_a_pipeline_whose_denoiser_got_a_processor_of_its_own_has_that(make):
    pipe = enable(CASE.build(), warmup_steps=3)
    pipe.transformer.set_attn_processor(PSAProcessor(**{**TINY_PRESET, **WARM}))
    other = make(pipe)
    assert torch.equal(run(other), expected("sparse"))
    assert not is_sparse(disable_psa(other))
    assert torch.equal(run(pipe), expected("sparse"))


def test_a_copy_that_was_made_in_a_call_is_on_too():
    pipe, copies = enable(CASE.build(), **WARM), []

    def callback(pipe, index, timestep, kwargs):
        copies.append(pickled(pipe) if index else copy.deepcopy(pipe))
        return kwargs

    CASE.run(pipe, steps=2, grid=SMALL, guidance=1.0, callback_on_step_end=callback)
    assert all(is_sparse(each) for each in copies)


# wrapped


class Wrapped(torch.nn.Module):
    """As data parallelism wraps."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


ADAPTER = {"r": 2, "target_modules": ["to_q"]}


def with_adapter(denoiser, **kwargs):
    return peft.get_peft_model(denoiser, peft.LoraConfig(**ADAPTER), **kwargs)


def compiled(denoiser):
    return torch.compile(denoiser, backend="eager")


WRAPPERS = {
    "adapter": with_adapter,
    "mixed-adapter": functools.partial(with_adapter, mixed=True),
    "tuner": lambda denoiser: peft.LoraModel(denoiser, peft.LoraConfig(**ADAPTER), "default"),
    "compiled-adapter": lambda denoiser: compiled(with_adapter(denoiser)),
    "adapter-of-compiled": lambda denoiser: with_adapter(compiled(denoiser)),
    "parallel": Wrapped,
    "twice": lambda denoiser: Wrapped(with_adapter(Wrapped(denoiser))),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_denoiser_is_found_inside(name):
    pipe = CASE.build()
    denoiser = pipe.transformer
    pipe.transformer = WRAPPERS[name](denoiser)
    assert host.unwrap(pipe.transformer) is denoiser
    enable(pipe, **WARM)
    if "compiled" in name:  # compiling takes its time, and is run elsewhere
        pipe.transformer = denoiser
    assert is_sparse(pipe)
    disable_psa(pipe)
    assert not is_sparse(pipe)
    assert not denoiser._forward_pre_hooks


@pytest.mark.parametrize("name", ["adapter", "parallel"])
def test_a_denoiser_that_is_wrapped_while_psa_is_on_keeps_it(name):
    pipe = enable(CASE.build(), **WARM)
    assert is_sparse(pipe)
    pipe.transformer = WRAPPERS[name](pipe.transformer)
    assert is_sparse(pipe)
    disable_psa(pipe)
    assert not is_sparse(pipe)


def test_a_processor_finds_its_denoiser_inside_a_wrapper():
    pipe = CASE.build()
    pipe.transformer.set_attn_processor(PSAProcessor(**{**TINY_PRESET, **WARM}))
    pipe.transformer = Wrapped(pipe.transformer)
    video = run(pipe)
    assert torch.equal(video, expected("sparse"))
    disable_psa(pipe)
    assert not is_sparse(pipe)


# enabled again


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"preset": "psa_balancd"}, ValueError),
        ({"warmup_step": 1}, ValueError),
        ({"mask_ratios": {1: [0, 0.4]}}, ValueError),
        ({"preset": PSAPreset}, TypeError),
        ({"preset": PSAProcessor}, TypeError),
        ({"config": "missing.yaml"}, FileNotFoundError),
        ({"refresh_every": 0}, ValueError),
    ],
    ids=str,
)
def test_a_wrong_new_choice_leaves_everything_as_it_was(wrong, error):
    pipe = enable(CASE.build(), **WARM)
    before = [part.processor for _, part in attentions(pipe)], type(pipe), state_of(pipe)
    hooks = list(pipe.transformer._forward_pre_hooks), list(pipe.transformer._forward_hooks)
    with pytest.raises(error):
        enable_psa(pipe, **wrong)
    assert ([part.processor for _, part in attentions(pipe)], type(pipe), state_of(pipe)) == before
    assert (list(pipe.transformer._forward_pre_hooks), list(pipe.transformer._forward_hooks)) == hooks
    assert is_sparse(pipe)


def test_enabling_again_changes_all_that_was_chosen():
    pipe = CASE.build()
    found, cls = [part.processor for _, part in attentions(pipe)], type(pipe)
    for choice in ({"warmup_steps": 2}, {"warmup_steps": 0, "report": True}, {"type": "dense", "report": True}, WARM):
        enable(pipe, **choice)
        run(pipe)
        assert (state_of(pipe).switch.run.recorder is not None) is bool(choice.get("report"))
        assert type(pipe).__mro__[1] is cls
        assert len(pipe.transformer._forward_hooks) == 1
    assert is_sparse(pipe)
    disable_psa(pipe)
    assert [part.processor for _, part in attentions(pipe)] == found
    assert type(pipe) is cls


# what users put on denoisers themselves


def set_on_one_layer(pipe):
    pipe.transformer.blocks[1].attn1.set_processor(PSAProcessor(**TINY_PRESET))


def set_by_name(pipe):
    processors = dict(pipe.transformer.attn_processors)
    processors["blocks.0.attn1.processor"] = PSAProcessor(**TINY_PRESET)
    pipe.transformer.set_attn_processor(processors)


def set_several(pipe):
    for part in (block.attn1 for block in pipe.transformer.blocks):
        part.set_processor(PSAProcessor(**TINY_PRESET))


def set_the_class(pipe):
    pipe.transformer.set_attn_processor(PSAProcessor)


@pytest.mark.parametrize("is_run", [False, True], ids=["", "run"])
@pytest.mark.parametrize("put", [set_on_one_layer, set_by_name, set_several, set_the_class])
def test_disabling_takes_off_whatever_of_ours_is_there(put, is_run):
    pipe = CASE.build()
    kinds = [type(part.processor) for _, part in attentions(pipe)]
    put(pipe)
    if is_run and put is not set_the_class:
        run(pipe)
    assert disable_psa(pipe) is pipe
    assert [type(part.processor) for _, part in attentions(pipe)] == kinds
    assert not is_sparse(pipe)
    enable(pipe, **WARM)
    assert is_sparse(pipe)


def test_disabling_leaves_a_pipeline_alone_that_shares_nothing():
    pipe, other = enable(CASE.build(), **WARM), CASE.build()
    other.transformer.blocks[0].attn1.processor = pipe.transformer.blocks[0].attn1.processor
    disable_psa(other)
    assert not is_sparse(other)
    assert is_sparse(pipe)


def test_the_class_on_a_denoiser_is_refused_with_the_remedy():
    pipe = CASE.build()
    set_the_class(pipe)
    with pytest.raises(RuntimeError, match="set the processors of the denoiser back"):
        enable(pipe)
    with pytest.raises(TypeError, match=r"write set_attn_processor\(PSAProcessor\(\.\.\.\)\)"):
        run(pipe)


@pytest.mark.parametrize(
    "wrong",
    [PSAProcessor, PSAPreset(), "psa_balanced", 3, None, {"a": PSAProcessor}],
    ids=lambda wrong: type(wrong).__name__,
)
def test_what_is_no_processor_is_refused_by_a_pipeline(wrong):
    pipe = enable(CASE.build(), **WARM)
    with pytest.raises(TypeError, match=r"needs a processor.*write PSAProcessor\("):
        pipe.set_attn_processor(wrong)
    assert is_sparse(pipe)


# graphs


def test_pipelines_and_switchings_share_their_graphs():
    case, layers = CASES["cogvideox"], {"layers": 1}
    small = {"steps": 2, "grid": SMALL, "guidance": 1.0}
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compile_and_run(pipe):
        pipe.transformer = torch.compile(pipe.transformer, backend=backend, fullgraph=True)
        case.run(pipe, **small)

    compile_and_run(case.build(**layers))
    dense = len(graphs)
    pipe = enable(case.build(**layers), warmup_steps=1)
    compile_and_run(pipe)
    once = len(graphs)
    assert once == 2 * dense + 1  # what was dense before, and again under PSA, and a sparse one
    disable_psa(pipe)
    case.run(pipe, **small)
    enable(pipe, warmup_steps=1)
    case.run(pipe, **small)
    assert len(graphs) == once
    compile_and_run(enable(case.build(**layers), warmup_steps=1))
    assert len(graphs) == once
    torch._dynamo.reset()
