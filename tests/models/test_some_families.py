"""What only some families do: masks, texts with padding, several segments, attention of their own."""

import importlib
import inspect
from collections import Counter

import diffusers
import pytest
import torch
from forwards import captured_inputs, forward
from guests import enable
from tiny import ALL_CASES, MISSING
from watch import expected_steps

from psa_diffusers.pipelines.report import psa_report

pytestmark = [
    pytest.mark.usefixtures("no_gradients"),
    # of Mochi and of schedulers
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]


def needs(name, module):
    if name not in ALL_CASES:
        pytest.skip(f"diffusers {diffusers.__version__} has no {MISSING[name].pipeline}")
    return importlib.import_module(module)


def run(name, **kwargs):
    """The records of one call."""
    needs(name, "diffusers")
    pipe = enable(ALL_CASES[name].build(), report=True)
    ALL_CASES[name].run(pipe, **kwargs)
    return psa_report(pipe).records


def test_a_block_causal_mask_makes_skyreels_dense_and_says_so():
    records = run("skyreels-forcing", steps=2, grid=(4, 6, 7), ar_step=1, causal_block_size=2)
    assert {(record["kind"], record["reason"]) for record in records} == {("dense", "an attention mask is in use")}


def test_chronoedit_follows_the_grid_when_it_stops_reasoning():
    records = run("chronoedit", steps=3, num_temporal_reasoning_steps=2)
    assert {(record["step"], record["grid"]) for record in records} == {(0, (3, 6, 7)), (1, (3, 6, 7)), (2, (2, 6, 7))}
    assert {record["kind"] for record in records} == {"sparse"}


@pytest.mark.parametrize(
    ("name", "segments"),
    [
        ("wan-animate", {"segment_frame_length": 5, "grid": (4, 6, 7)}),
        ("skyreels-forcing", {"base_num_frames": 9, "overlap_history": 5, "grid": (5, 6, 7)}),
    ],
)
def test_every_segment_of_a_long_video_warms_up(name, segments, watch):
    needs(name, "diffusers")
    case, pipe = ALL_CASES[name], enable(ALL_CASES[name].build(), warmup_steps=1)
    watch.denoisers(pipe, case.attentions)
    case.run(pipe, steps=3, **segments)
    steps = watch.steps()
    assert len(steps) % 3 == 0
    assert len(steps) > 3
    assert steps == expected_steps(3, 1, case.layers * case.passes) * (len(steps) // 3)


PADDED = [name for name, case in ALL_CASES.items() if case.padded is not None and case.several]


@pytest.mark.parametrize("name", PADDED)
def test_a_batch_of_texts_of_different_lengths_gives_what_each_gives_alone(name):
    pipe = enable(ALL_CASES[name].build())
    inputs = captured_inputs(pipe, name, steps=2, prompt=["a cat", "a brown dog"], negative_prompt=["bad", "worse"])[0]
    batch = len(inputs["timestep"])
    together = forward(pipe, inputs)
    for sample in range(batch):
        alone = {key: take(value, sample, batch) for key, value in inputs.items()}
        torch.testing.assert_close(forward(pipe, alone), together[sample : sample + 1])


def take(value, sample, batch):
    """One sample of an input."""
    is_batch = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == batch
    return value[sample : sample + 1] if is_batch else value


@pytest.mark.parametrize("name", PADDED)
def test_what_stands_in_the_padding_changes_no_bit(name):
    pipe = enable(ALL_CASES[name].build())
    inputs = captured_inputs(pipe, name, steps=2)[0]
    mask = inputs["encoder_attention_mask"].bool()
    video = forward(pipe, inputs)
    text = torch.where(mask[..., None], inputs["encoder_hidden_states"], 7.0)
    assert torch.equal(forward(pipe, {**inputs, "encoder_hidden_states": text}), video)
    assert not mask.all(), "there is padding to change"


def test_padding_before_the_text_is_dense_and_says_so():
    pipe = enable(ALL_CASES["mochi"].build(), report=True)
    inputs = captured_inputs(pipe, "mochi", steps=2)[0]
    forward(pipe, {**inputs, "encoder_attention_mask": inputs["encoder_attention_mask"].flip(1)})
    assert psa_report(pipe).records[-1]["reason"] == "the padding of the text is not at its end"


def test_a_batch_that_was_changed_on_the_way_is_dense_and_says_so():
    pipe = enable(ALL_CASES["hunyuan-video"].build())
    inputs = captured_inputs(pipe, "hunyuan-video", steps=1)[0]
    forward(pipe, inputs)  # of one sample
    attention, reasons = pipe.transformer.transformer_blocks[0].attn, []

    def with_two_samples(*_):
        reasons.append(attention.processor.why_dense(attention, torch.ones(2, 3 * 6 * 7, 32), None))

    attention.register_forward_pre_hook(with_two_samples)
    forward(pipe, inputs)
    assert reasons[0] == "something between the denoiser and its layers has changed the batch"


def test_texts_of_any_length_share_a_graph_of_a_compiled_denoiser():
    torch._dynamo.reset()
    pipe = enable(ALL_CASES["hunyuan-video"].build())
    prompts = ("a cat", "a brown dog", "a fox in the snow")
    inputs = [captured_inputs(pipe, "hunyuan-video", steps=1, prompt=prompt)[0] for prompt in prompts]
    eager = [forward(pipe, arguments) for arguments in inputs]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    pipe.transformer.compile(fullgraph=True, backend=backend)
    assert torch.equal(forward(pipe, inputs[0]), eager[0])
    compiled = len(graphs)
    assert all(torch.equal(forward(pipe, each), video) for each, video in zip(inputs, eager, strict=True))
    assert len(graphs) == compiled
    torch._dynamo.reset()


def test_hunyuan_video_15_makes_no_mask(monkeypatch):
    module = needs("hunyuan-video-1.5", "diffusers.models.transformers.transformer_hunyuan_video15")
    pipe = enable(ALL_CASES["hunyuan-video-1.5"].build())
    monkeypatch.setattr(module, "dispatch_attention_fn", None)  # upstream's way, which comes after the mask is made
    ALL_CASES["hunyuan-video-1.5"].run(pipe, steps=1)


def test_the_decoder_of_motif_video_sees_both_versions_of_the_video():
    needs("motif-video", "diffusers")
    case, pipe = ALL_CASES["motif-video"], ALL_CASES["motif-video"].build(num_single_layers=2, num_decoder_layers=1)
    inputs = captured_inputs(pipe, "motif-video", steps=1)[0]
    dense = forward(pipe, inputs)
    enable(pipe, mask_ratios={1: [0, 1]}, report=True)
    torch.testing.assert_close(forward(pipe, inputs), dense)
    frames, height, width = case.grid
    decoder = {record["layer"]: record for record in psa_report(pipe).records}["single_transformer_blocks.1.attn"]
    assert decoder["kind"] == "sparse"
    assert decoder["grid"] == (2 * frames, height, width)
    assert decoder["tokens"] == 2 * frames * height * width


def test_ltx2_leaves_perturbed_layers_to_upstream():
    needs("ltx2.3-condition", "diffusers")
    case, pipe = ALL_CASES["ltx2.3-condition"], ALL_CASES["ltx2.3-condition"].build()
    guidance = {"stg_scale": 1.0, "modality_scale": 3.0, "spatio_temporal_guidance_blocks": [1], "steps": 2}
    dense = case.run(pipe, **guidance)
    enable(pipe, report=True, mask_ratios={1: [0, 1]})
    torch.testing.assert_close(case.run(pipe, **guidance), dense)
    records = psa_report(pipe).records
    reasons = Counter((record["layer"], record["reason"]) for record in records)
    # both branches of guidance at once, one pass that perturbs layer 1, one without sound
    assert reasons == {
        ("transformer_blocks.0.attn1", ""): 6,
        ("transformer_blocks.1.attn1", ""): 4,
        ("transformer_blocks.1.attn1", "spatio-temporal guidance leaves attention out in this layer"): 2,
    }


def test_ltx2_with_a_mask_between_tokens_is_dense_and_says_so():
    needs("ltx2", "diffusers")
    pipe = enable(ALL_CASES["ltx2"].build(), report=True)
    if "video_self_attention_mask" not in inspect.signature(type(pipe.transformer).forward).parameters:
        pytest.skip(f"LTX-2 of diffusers {diffusers.__version__} takes no such mask")
    inputs = captured_inputs(pipe, "ltx2", steps=1)[0]
    tokens = inputs["hidden_states"].shape[1]
    forward(pipe, {**inputs, "video_self_attention_mask": torch.ones(2, tokens, tokens)})
    assert psa_report(pipe).records[-1]["reason"] == "an attention mask is in use"


def test_the_models_own_sparse_attention_stays(monkeypatch):
    module = needs("kandinsky5", "diffusers.models.transformers.transformer_kandinsky")
    pipe = enable(ALL_CASES["kandinsky5"].build(), report=True)
    inputs = captured_inputs(pipe, "kandinsky5", steps=1, grid=(2, 8, 8))[0]
    monkeypatch.setattr(module, "nablaT_v2", lambda *args, **kwargs: None)  # its mask needs a GPU
    sparse = {"to_fractal": True, "sta_mask": None, "P": 0.9}
    forward(pipe, {**inputs, "sparse_params": sparse})
    assert psa_report(pipe).records[-1]["reason"] == "the model's own block-sparse attention is in use"
