"""`PSAProcessor`: the way in through diffusers' own `set_attn_processor`."""

import subprocess
import sys

import pytest
import tiny
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from guests import denoisers
from tiny import CASES, TINY_PRESET
from watch import expected_steps

from psa_diffusers.pipelines.enable import disable_psa, enable_psa
from psa_diffusers.pipelines.report import psa_report
from psa_diffusers.presets import PSAPreset, load_preset
from psa_diffusers.processors.base import FamilyProcessor
from psa_diffusers.processors.standalone import PSAProcessor

pytestmark = pytest.mark.usefixtures("no_gradients")
CHOICE = {**TINY_PRESET, "warmup_steps": 1}


# on a pipeline


def test_on_a_pipeline_it_is_enable_psa():
    pipe = CASES["wan2.1"].build()
    found = pipe.transformer.blocks[0].attn1.processor
    assert pipe.set_attn_processor(PSAProcessor("psa_balanced", report=True, **CHOICE)) is None
    assert isinstance(pipe.transformer.blocks[0].attn1.processor, FamilyProcessor)
    CASES["wan2.1"].run(pipe)
    assert psa_report(pipe).records
    pipe.set_attn_processor(PSAProcessor("baseline", report=True))
    CASES["wan2.1"].run(pipe)
    assert {record["reason"] for record in psa_report(pipe).records} == {"the preset is dense"}
    disable_psa(pipe)
    assert pipe.transformer.blocks[0].attn1.processor is found


def test_another_processor_on_a_pipeline_switches_psa_off_and_goes_to_each_denoiser():
    pipe = enable_psa(CASES["wan2.2-a14b"].build(), **CHOICE)
    cls = type(pipe).__base__
    mine = WanAttnProcessor()
    pipe.set_attn_processor(mine)
    assert type(pipe) is cls
    for denoiser in denoisers(pipe):
        assert set(denoiser.attn_processors.values()) == {mine}


def test_a_dict_of_processors_serves_both_experts_and_is_left_as_it_was():
    pipe = CASES["wan2.2-a14b"].build()
    given = {name: WanAttnProcessor() for name in pipe.transformer.attn_processors}
    pipe.set_attn_processor(given)
    assert len(given) == 4
    for denoiser in denoisers(pipe):
        assert denoiser.attn_processors == given


def test_a_pipeline_without_a_denoiser_says_so():
    pipe = CASES["wan2.1"].build()
    pipe.transformer = None
    with pytest.raises(TypeError, match="WanPipeline has no denoiser with set_attn_processor"):
        pipe.set_attn_processor(WanAttnProcessor())


@pytest.mark.parametrize(
    "imports",
    [
        pytest.param("import psa_diffusers; from diffusers import DiffusionPipeline", id="before-diffusers"),
        pytest.param("from diffusers import DiffusionPipeline; import psa_diffusers", id="after-diffusers"),
    ],
)
def test_importing_the_package_adds_the_method_and_loads_no_pipelines(imports):
    check = (
        "import sys, diffusers, psa_diffusers.processors.clock\n"
        "early = 'diffusers.pipelines.pipeline_utils' in sys.modules\n"
        f"{imports}\n"
        "assert not early\n"
        "from psa_diffusers.pipelines.enable import set_attn_processor\n"
        "assert DiffusionPipeline.set_attn_processor is set_attn_processor\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


# on a denoiser


@pytest.mark.parametrize("name", ["cogvideox", "wan2.1", "wan2.2-a14b"])
def test_on_a_denoiser_it_gives_the_same_bits_as_enable_psa(name, watch):
    pipe = CASES[name].build()
    # as an object: without its pipeline, an expert of Wan 2.2 A14B looks like Wan 2.1 and gets other presets
    preset = load_preset("default", **CHOICE)
    enable_psa(pipe, preset)
    enabled = CASES[name].run(pipe)
    disable_psa(pipe)
    processor = PSAProcessor(preset)
    for denoiser in denoisers(pipe):
        denoiser.set_attn_processor(processor)
    watch.denoisers(pipe)
    watch.clear()
    for _ in range(2):
        assert torch.equal(CASES[name].run(pipe), enabled)
    steps = expected_steps(4, 1, 2 * CASES[name].passes)
    assert watch.steps() == steps * 2


def test_cross_attention_runs_as_diffusers_would_run_it(monkeypatch):
    pipe = CASES["wan2.1"].build()
    pipe.transformer.set_attn_processor(PSAProcessor(**CHOICE))
    crossed = []
    original = WanAttnProcessor.__call__

    def noting(self, attn, hidden_states, encoder_hidden_states=None, *rest):
        crossed.append(attn.is_cross_attention)
        return original(self, attn, hidden_states, encoder_hidden_states, *rest)

    monkeypatch.setattr(WanAttnProcessor, "__call__", noting)
    CASES["wan2.1"].run(pipe)
    # 2 layers, 2 passes; 4 steps of cross-attention, 1 warm-up step of self-attention
    assert (crossed.count(True), crossed.count(False)) == (16, 4)


def test_a_bare_denoiser_outside_any_pipeline_works(watch):
    denoiser = tiny.wan_transformer()
    denoiser.set_attn_processor(PSAProcessor(**CHOICE, report=True))
    latents, text = torch.ones(1, 16, 3, 12, 14), torch.ones(1, 8, 32)
    for timestep in (900.0, 500.0, 100.0):
        denoiser(latents, torch.tensor([timestep]), text)
    report = psa_report(denoiser)
    assert [(record["step"], record["kind"]) for record in report.records] == [
        (step, kind) for step, kind in enumerate(["dense", "sparse", "sparse"]) for _ in range(2)
    ]
    assert {record["denoiser"] for record in report.records} == {"WanTransformer3DModel"}


def test_one_object_on_two_experts_shares_the_clock(watch):
    pipe = CASES["wan2.2-a14b"].build()
    processor = PSAProcessor(**CHOICE, report=True)
    for denoiser in denoisers(pipe):
        denoiser.set_attn_processor(processor)
    CASES["wan2.2-a14b"].run(pipe)
    records = psa_report(pipe).records
    assert {record["denoiser"] for record in records} == {"WanTransformer3DModel", "WanTransformer3DModel 2"}
    assert {(record["step"], record["kind"]) for record in records} == {
        (0, "dense"),
        *((step, "sparse") for step in (1, 2, 3)),
    }


def test_nothing_of_the_model_changes():
    denoiser = tiny.cogvideox_transformer()
    keys = list(denoiser.state_dict())
    denoiser.set_attn_processor(PSAProcessor())
    assert list(denoiser.state_dict()) == keys


def test_another_processor_ends_it_and_setting_it_again_brings_it_back(watch):
    pipe = CASES["wan2.1"].build()
    dense = CASES["wan2.1"].run(pipe)
    found = dict(pipe.transformer.attn_processors)
    processor = PSAProcessor(**CHOICE)
    pipe.transformer.set_attn_processor(processor)
    sparse = CASES["wan2.1"].run(pipe)
    pipe.transformer.set_attn_processor(dict(found))
    assert torch.equal(CASES["wan2.1"].run(pipe), dense)
    assert not pipe.transformer._forward_pre_hooks
    pipe.transformer.set_attn_processor(processor)
    assert torch.equal(CASES["wan2.1"].run(pipe, grid=(2, 6, 7)), CASES["wan2.1"].run(pipe, grid=(2, 6, 7)))
    assert torch.equal(CASES["wan2.1"].run(pipe), sparse)
    assert len(pipe.transformer._forward_pre_hooks) == 1


def test_enable_psa_refuses_a_denoiser_that_has_one():
    pipe = CASES["wan2.1"].build()
    pipe.transformer.set_attn_processor(PSAProcessor())
    with pytest.raises(RuntimeError, match="set the processors of the denoiser back"):
        enable_psa(pipe)


def test_fused_projections_are_used():
    pipe = CASES["cogvideox"].build()
    pipe.transformer.fuse_qkv_projections()
    enable_psa(pipe, **CHOICE)
    enabled = CASES["cogvideox"].run(pipe)
    disable_psa(pipe)
    pipe.transformer.set_attn_processor(PSAProcessor(**CHOICE))
    assert torch.equal(CASES["cogvideox"].run(pipe), enabled)


def test_model_offload_keeps_it():
    pipe = CASES["wan2.1"].build()
    pipe.transformer.set_attn_processor(PSAProcessor(**CHOICE))
    first = CASES["wan2.1"].run(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(CASES["wan2.1"].run(pipe), first)


def test_the_attention_backend_of_the_model_reaches_the_dense_calls():
    pipe = CASES["wan2.1"].build()
    processor = PSAProcessor(**CHOICE)
    pipe.transformer.set_attn_processor(processor)
    processor._attention_backend = "native"
    CASES["wan2.1"].run(pipe, steps=1)
    attention = pipe.transformer.blocks[0].attn1
    assert processor._processors[attention].original._attention_backend == "native"


# where it cannot work


def test_an_attention_of_no_known_denoiser_gets_the_remedy():
    attention = tiny.wan_transformer().blocks[0].attn1
    attention.set_processor(PSAProcessor())
    with pytest.raises(RuntimeError, match=r"Use enable_psa\(pipe\) instead.*Supported denoisers"):
        attention(torch.ones(1, 8, 32))


INPUTS = (torch.ones(1, 16, 3, 12, 14), torch.tensor([1.0]), torch.ones(1, 8, 32))


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("was_run", [False, True], ids=["compiled-first", "run-once-before"])
@pytest.mark.parametrize("in_place", [False, True], ids=["wrapped", "in-place"])
def test_a_compiled_denoiser_gives_the_same(was_run, in_place):
    preset = load_preset("default", **TINY_PRESET)
    denoiser, reference = tiny.wan_transformer(), tiny.wan_transformer()
    for each in (denoiser, reference):
        each.set_attn_processor(PSAProcessor(preset))
    if was_run:
        denoiser(*INPUTS)
    # the search for the denoiser breaks the graph; only afterwards the forward is one graph
    how = {"backend": "eager", "fullgraph": was_run}
    compiled = denoiser if in_place else torch.compile(denoiser, **how)
    if in_place:
        denoiser.compile(**how)
    assert torch.equal(compiled(*INPUTS).sample, reference(*INPUTS).sample)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param({"preset": "psa_balancd"}, ValueError, "psa_balanced", id="unknown-name"),
        pytest.param({"warmup_step": 1}, ValueError, "warmup_steps", id="unknown-key"),
        pytest.param({"preset": PSAPreset(), "warmup_step": 1}, ValueError, "warmup_steps", id="unknown-key-of-object"),
        pytest.param({"preset": 3}, TypeError, "preset must be a name", id="wrong-kind"),
        pytest.param({"config": "missing.yaml"}, FileNotFoundError, "missing.yaml", id="no-file"),
    ],
)
def test_a_wrong_choice_is_refused_when_the_object_is_made(arguments, error, message):
    with pytest.raises(error, match=message):
        PSAProcessor(**arguments)


def test_presets_of_single_models_are_accepted():
    assert PSAProcessor("psa_4steps").preset == "psa_4steps"
