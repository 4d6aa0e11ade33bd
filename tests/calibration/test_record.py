"""record_qkv on small real pipelines: what is in the file is what the attention was given, and nothing else changes."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from guests import one_of_each
from safetensors import safe_open
from small_disk import largest_file
from tiny import ALL_CASES, CASES, TEXT_TOKENS, TINY_PRESET

from psa_diffusers import disable_psa, enable_psa, record_qkv
from psa_diffusers.calibration import recover_recording, writer
from psa_diffusers.pipelines.enable import find_denoisers

pytestmark = pytest.mark.usefixtures("no_gradients")


def read(path):
    """Records, and tensors by key."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["records"]), {key: file.get_tensor(key) for key in file.keys()}


def hooks_of(pipe):
    return [
        hook
        for _, denoiser, _ in find_denoisers(pipe)
        for module in denoiser.modules()
        for hook in module._forward_pre_hooks.values()
    ]


@pytest.fixture
def attended(monkeypatch):
    """q, k, v of every call of torch's attention over as many keys as queries, in order."""
    calls = []
    attend = F.scaled_dot_product_attention

    def noting(query, key, value, **kwargs):
        if query.shape == key.shape:
            calls.append([x.clone() for x in (query, key, value)])
        return attend(query, key, value, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    return calls


@pytest.mark.parametrize("name", CASES)
def test_the_file_holds_what_dense_attention_was_given(name, attended, tmp_path):
    pipe, case = CASES[name].build(), CASES[name]
    inputs = case.inputs(steps=2)
    with record_qkv(pipe, tmp_path / "qkv.safetensors") as recording:
        pipe(**inputs)
    records, tensors = read(tmp_path / "qkv.safetensors")
    tokens = case.text + case.grid[0] * case.grid[1] * case.grid[2]
    expected = [call for call in attended if call[0].shape[2] == tokens]
    assert len(records) == len(expected) == 2 * 2 * case.passes
    assert recording.records == records
    for record, call in zip(records, expected, strict=True):
        assert all(torch.equal(tensors[record["key"] + part], x) for part, x in zip("qkv", call, strict=True))
        assert (tuple(record["grid"]), record["text_tokens"], record["text_first"]) == (case.grid, case.text, True)
    steps = [record["step"] for record in records]
    assert steps == sorted(steps)
    assert {(record["step"], record["layer"]) for record in records} == {(0, 0), (0, 1), (1, 0), (1, 1)}


@pytest.mark.parametrize("name", ["hunyuan-video", "mochi"])
def test_texts_of_different_lengths_are_recorded_one_by_one_without_padding(name, tmp_path):
    pipe, case = ALL_CASES[name].build(), ALL_CASES[name]
    prompts = {"prompt": ["a cat", "a brown dog"], "negative_prompt": ["bad", "worse"]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "In CPU autocast")  # Mochi asks for one that CPUs do not have
        with record_qkv(pipe, tmp_path / "qkv.safetensors", steps=0, layers=0):
            case.run(pipe, steps=2, **prompts)
    records, tensors = read(tmp_path / "qkv.safetensors")
    # Mochi runs both branches of guidance in one batch, HunyuanVideo one after the other
    texts = (
        [["bad", "worse", "a cat", "a brown dog"]] if case.passes == 1 else [["a cat", "a brown dog"], ["bad", "worse"]]
    )
    expected = [((n, len(batch)), case.tokens(text)) for batch in texts for n, text in enumerate(batch)]
    assert [(tuple(record["sample"]), tensors[record["key"] + "q"].shape[2]) for record in records] == expected
    branches = ["uncond", "uncond", "cond", "cond"] if case.passes == 1 else ["cond", "cond", "uncond", "uncond"]
    assert [record["branch"] for record in records] == branches


@pytest.mark.parametrize("with_psa", [False, True], ids=["dense", "psa"])
@one_of_each
def test_recording_changes_nothing(name, with_psa, tmp_path):
    pipe, case = CASES[name].build(), CASES[name]
    if with_psa:
        enable_psa(pipe, **TINY_PRESET)
    before, hooks = case.run(pipe), hooks_of(pipe)
    state = torch.random.get_rng_state()
    with record_qkv(pipe, tmp_path / "qkv.safetensors", steps="1:3"):
        assert torch.equal(case.run(pipe), before)
    assert hooks_of(pipe) == hooks
    assert torch.equal(case.run(pipe), before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [path.name for path in tmp_path.iterdir()] == ["qkv.safetensors"]
    disable_psa(pipe)


@one_of_each
def test_dense_and_sparse_pipelines_are_read_alike(name, tmp_path):
    # the first self-attention of the first step comes before anything that PSA could change
    pipe, case = CASES[name].build(), CASES[name]
    first = {"steps": 0, "layers": 0}
    with record_qkv(pipe, tmp_path / "dense.safetensors", **first):
        case.run(pipe)
    enable_psa(pipe, **TINY_PRESET)
    with record_qkv(pipe, tmp_path / "psa.safetensors", **first):
        case.run(pipe)
    (dense, dense_x), (psa, psa_x) = (read(tmp_path / f"{kind}.safetensors") for kind in ("dense", "psa"))
    assert dense == psa
    assert all(torch.equal(x, psa_x[key]) for key, x in dense_x.items())


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"steps": "0,-1", "layers": 1}, {(0, 1), (3, 1)}),
        ({"steps": "50%:", "layers": "-1"}, {(2, 1), (3, 1)}),
        ({"steps": [1, 2], "layers": [0]}, {(1, 0), (2, 0)}),
    ],
)
@one_of_each
def test_only_what_was_asked_for(name, where, expected, tmp_path):
    pipe = CASES[name].build()
    with record_qkv(pipe, tmp_path / "qkv.safetensors", **where, heads="-1"):
        CASES[name].run(pipe)
    records, tensors = read(tmp_path / "qkv.safetensors")
    assert {(record["step"], record["layer"]) for record in records} == expected
    assert all(x.shape[1] == 1 for x in tensors.values())


@pytest.mark.parametrize(("name", "branches"), [("cogvideox", ["uncond,cond"]), ("wan2.1", ["cond", "uncond"])])
def test_branches_of_guidance_are_named(name, branches, tmp_path):
    pipe, case = CASES[name].build(), CASES[name]
    last = {"steps": 0, "layers": -1}
    with record_qkv(pipe, tmp_path / "guided.safetensors", **last):
        case.run(pipe)
    with record_qkv(pipe, tmp_path / "alone.safetensors", **last):
        case.run(pipe, guidance=1.0)
    (guided, tensors), (alone, alone_tensors) = (read(tmp_path / f"{kind}.safetensors") for kind in ("guided", "alone"))
    assert [record["branch"] for record in guided] == branches
    assert [record["branch"] for record in alone] == ["cond"]
    by_branch = {}
    for record in guided:
        parts = tensors[record["key"] + "q"].chunk(len(record["branch"].split(",")))
        by_branch |= dict(zip(record["branch"].split(","), parts, strict=True))
    q = alone_tensors[alone[0]["key"] + "q"]
    torch.testing.assert_close(by_branch["cond"], q)
    assert (by_branch["uncond"] - q).abs().max() > 1e-4


def test_calls_of_the_pipeline_and_experts_are_told_apart(tmp_path):
    pipe, case = CASES["wan2.2-a14b"].build(), CASES["wan2.2-a14b"]
    with record_qkv(pipe, tmp_path / "qkv.safetensors", layers=0):
        case.run(pipe, guidance=1.0, steps=4)
        case.run(pipe, guidance=1.0, steps=4)
    records, tensors = read(tmp_path / "qkv.safetensors")
    assert len({record["key"] for record in records}) == len(records) == 8
    assert len(tensors) == 24
    assert [(record["call"], record["step"]) for record in records] == [(c, s) for c in (0, 1) for s in range(4)]
    assert {record["denoiser"] for record in records} == {"transformer", "transformer_2"}


def test_half_precision_is_kept(tmp_path):
    pipe = CASES["wan2.1"].build().to(torch.bfloat16)
    with record_qkv(pipe, tmp_path / "qkv.safetensors", steps=0):
        CASES["wan2.1"].run(pipe)
    _, tensors = read(tmp_path / "qkv.safetensors")
    assert {x.dtype for x in tensors.values()} == {torch.bfloat16}
    assert all(x.float().abs().max() > 0 for x in tensors.values())


def test_steps_whose_timesteps_round_to_one_value_are_told_apart(tmp_path):
    pipe, case, dtype = CASES["wan2.1"].build(), CASES["wan2.1"], torch.bfloat16
    with record_qkv(pipe.to(dtype), tmp_path / "qkv.safetensors", layers=0, heads=0) as recording:
        case.run(pipe, steps=90, grid=(1, 2, 2), guidance=1.0)
    timesteps = [record["timestep"] for record in recording.records]
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "timestep": kwargs["timestep"].to(dtype)}), with_kwargs=True
    )
    with record_qkv(pipe, tmp_path / "qkv.safetensors", layers=0, heads=0) as rounded:
        case.run(pipe, steps=90, grid=(1, 2, 2), guidance=1.0)
    assert len({record["timestep"] for record in rounded.records}) < len(set(timesteps)), "the case is one"
    for records in (recording.records, rounded.records):
        assert [(record["call"], record["step"]) for record in records] == [(0, step) for step in range(90)]


def test_a_full_file_takes_no_more_and_says_so(tmp_path, caplog):
    pipe = CASES["cogvideox"].build()
    call = 3 * 2 * 2 * (126 + TEXT_TOKENS) * 16 * 4
    with record_qkv(pipe, tmp_path / "qkv.safetensors", max_gib=3.5 * call / 2**30) as recording:
        CASES["cogvideox"].run(pipe)
    assert len(recording.records) == 3
    assert not recording.complete
    assert recording.num_bytes == 3 * call
    assert sum("is full after 3 calls" in line for line in caplog.messages) == 1


class Stop(Exception):
    pass


@one_of_each
def test_after_an_exception_everything_is_back_and_the_file_is_there(name, tmp_path):
    pipe = CASES[name].build()

    def stop(pipe, step, timestep, kwargs):
        if step == 1:
            raise Stop
        return kwargs

    with pytest.raises(Stop), record_qkv(pipe, tmp_path / "qkv.safetensors", layers=0):
        CASES[name].run(pipe, callback_on_step_end=stop)
    assert hooks_of(pipe) == []
    assert {record["step"] for record in read(tmp_path / "qkv.safetensors")[0]} == {0, 1}
    with safe_open(tmp_path / "qkv.safetensors", "pt") as file:
        assert file.metadata()["complete"] == "false"
    with pytest.raises(Stop), record_qkv(pipe, tmp_path / "none.safetensors"):
        raise Stop
    assert [path.name for path in tmp_path.iterdir()] == ["qkv.safetensors"]


def test_nothing_recorded_is_an_error_that_says_why(tmp_path):
    pipe = CASES["cogvideox"].build()
    with (
        pytest.raises(RuntimeError, match="ran 2 times, and no call matched"),
        record_qkv(pipe, tmp_path / "qkv.safetensors", steps="7:"),
    ):
        CASES["cogvideox"].run(pipe, steps=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [({"steps": "first"}, ValueError, "no range"), ({"max_gib": 0}, ValueError, "max_gib must be positive")],
)
def test_bad_arguments_change_nothing(change, error, match, tmp_path):
    pipe = CASES["cogvideox"].build()
    with pytest.raises(error, match=match), record_qkv(pipe, tmp_path / "qkv.safetensors", **change):
        pass
    assert hooks_of(pipe) == []
    with pytest.raises(TypeError, match="needs a diffusers pipeline"), record_qkv(object(), tmp_path / "qkv"):
        pass


@one_of_each
def test_a_compiled_denoiser_is_heard(name, tmp_path):
    pipe, case = CASES[name].build(), CASES[name]
    case.run(pipe, steps=1)
    pipe.transformer.compile(backend="eager")
    case.run(pipe, steps=1)
    with record_qkv(pipe, tmp_path / "qkv.safetensors"):
        case.run(pipe, steps=1)
    assert len(read(tmp_path / "qkv.safetensors")[0]) == 2 * case.passes


def test_places_that_cannot_be_are_refused_before_the_pipeline_runs(tmp_path):
    pipe, ran = CASES["wan2.1"].build(), []
    (tmp_path / "file").touch()
    for path, error in [(tmp_path, IsADirectoryError), (tmp_path / "file" / "qkv.safetensors", NotADirectoryError)]:
        with pytest.raises(error, match="give "), record_qkv(pipe, path):
            ran.append(path)
    with (
        largest_file(10_000),
        pytest.raises(OSError, match=r"qkv\.safetensors.*too large"),
        record_qkv(pipe, tmp_path / "qkv.safetensors"),
    ):
        ran.append(1)
    with record_qkv(pipe, tmp_path / "new" / "folder" / "qkv.safetensors", steps=0):
        with (
            pytest.raises(OSError, match="another process, or another call"),
            record_qkv(pipe, tmp_path / "new" / "folder" / "qkv.safetensors"),
        ):
            ran.append(2)
        CASES["wan2.1"].run(pipe, steps=1)
    assert ran == []
    assert hooks_of(pipe) == []
    assert len(read(tmp_path / "new" / "folder" / "qkv.safetensors")[0]) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"file", "new"}


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_disk_that_fills_up_keeps_the_calls_before(after, tmp_path):
    pipe, case, path = CASES["cogvideox"].build(), CASES["cogvideox"], tmp_path / "qkv.safetensors"
    with record_qkv(pipe, path) as whole:
        case.run(pipe, steps=2)
    records, tensors = read(path)
    size = whole.num_bytes // len(records)
    # all of the limit but for what a further call needs
    with (
        pytest.raises(OSError, match=rf"cannot write .*the file has the {after} calls before. Make room"),
        record_qkv(pipe, path) as part,
        largest_file(2**16 + int((after + 0.6) * size)),
    ):
        case.run(pipe, steps=2)
    assert not part.complete
    assert hooks_of(pipe) == []
    kept, kept_tensors = read(path)
    # without any call the earlier file stays
    assert kept == (records[:after] if after else records)
    assert all(torch.equal(x, tensors[key]) for key, x in kept_tensors.items())
    assert [each.name for each in tmp_path.iterdir()] == ["qkv.safetensors"]


def test_ctrl_c_in_the_middle_of_a_write_keeps_the_calls_before(tmp_path, monkeypatch):
    pipe, path = CASES["wan2.1"].build(), tmp_path / "qkv.safetensors"
    write, count = writer._write_at, itertools.count()

    def interrupted(file, position, data):
        if next(count) == 8:
            write(file, position, bytes(data)[:1000])
            raise KeyboardInterrupt
        write(file, position, data)

    monkeypatch.setattr(writer, "_write_at", interrupted)
    with pytest.raises(KeyboardInterrupt), record_qkv(pipe, path):
        CASES["wan2.1"].run(pipe, steps=2)
    records, tensors = read(path)
    assert len(tensors) == 3 * len(records) == 3


KILLED = """
import sys, torch
from tiny import CASES
from psa_diffusers import record_qkv
pipe, case = CASES["wan2.1"].build(), CASES["wan2.1"]
with torch.no_grad(), record_qkv(pipe, sys.argv[1], heads=0):
    print("ready", flush=True)
    while True:
        case.run(pipe, steps=3)
"""


def test_a_killed_recording_is_kept_beside_the_next_one(tmp_path, caplog):
    pipe, case, path = CASES["wan2.1"].build(), CASES["wan2.1"], tmp_path / "qkv.safetensors"
    with record_qkv(pipe, path, heads=0):
        case.run(pipe, steps=3)
    records, tensors = read(path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-W", "ignore", "-c", KILLED, path], env=environment, stdout=-1)
    assert child.stdout.readline() == b"ready\n"
    journal = path.with_name("qkv.safetensors.part.jsonl")
    while journal.read_bytes().count(b"\n") < 5:
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert read(path)[0] == records, "the earlier file"

    with record_qkv(pipe, path, steps=0):
        case.run(pipe, steps=3)
    beside = tmp_path / "qkv.interrupted.safetensors"
    assert f"its calls are in {beside}" in caplog.text
    killed, killed_tensors = read(beside)
    assert len(killed) >= 5
    first = [record for record in killed if record["call"] == 0]
    assert first == records[: len(first)]
    assert all(torch.equal(killed_tensors[r["key"] + part], tensors[r["key"] + part]) for r in first for part in "qkv")
    assert {record["step"] for record in read(path)[0]} == {0}
    with pytest.raises(FileNotFoundError, match="no interrupted recording"):
        recover_recording(path)


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ({"steps": "0,9"}, "steps='0,9' matches nothing at 9: there are 4 steps, 0 to 3"),
        ({"steps": [0, 2, 7, 8]}, "steps='0,2,7,8' matches nothing at 7 and 8: there are 4 steps, 0 to 3"),
        ({"steps": 0, "layers": "0,-3"}, "layers='0,-3' matches nothing at -3: there are 2 layers, 0 to 1"),
        ({"steps": 0, "heads": "1:,5:9"}, "heads='1:,5:9' matches nothing at 5:9: there are 2 heads, 0 to 1"),
        ({"steps": "0:10", "layers": 0}, None),
    ],
)
def test_places_that_a_run_does_not_have_are_told_once(where, says, tmp_path, caplog):
    pipe, ran = CASES["cogvideox"].build(), []
    with record_qkv(pipe, tmp_path / "qkv.safetensors", **where):
        for _ in range(2):
            CASES["cogvideox"].run(pipe, callback_on_step_end=lambda p, i, t, k: ran.append(caplog.text) or k)
    told = [line for line in caplog.messages if "matches nothing" in line]
    assert told == ([f"record_qkv: {says}"] if says else [])
    assert all(says in text for text in ran if says), "in the first step already"


def test_heads_that_match_nothing_are_in_the_error(tmp_path):
    pipe = CASES["cogvideox"].build()
    with (
        pytest.raises(RuntimeError, match=r"no call matched .*'heads': '7'"),
        record_qkv(pipe, tmp_path / "q", heads=7),
    ):
        CASES["cogvideox"].run(pipe, steps=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_recorded_and_told_once(value, tmp_path, caplog):
    pipe = CASES["cogvideox"].build()
    with record_qkv(pipe, tmp_path / "fine.safetensors", steps=0) as fine:
        CASES["cogvideox"].run(pipe, steps=1)
    assert all(record["finite"] for record in fine.records)
    assert "not finite" not in caplog.text
    pipe.transformer.transformer_blocks[1].attn1.to_q.weight[0, 0] = value
    with record_qkv(pipe, tmp_path / "qkv.safetensors"):
        CASES["cogvideox"].run(pipe, steps=2)
    records, tensors = read(tmp_path / "qkv.safetensors")
    assert [record["finite"] for record in records] == [True, False, False, False]
    for record in records:
        assert record["finite"] == all(bool(tensors[record["key"] + part].isfinite().all()) for part in "qkv")
    [told] = [line for line in caplog.messages if "not finite" in line]
    assert "step 0, layer 1 of transformer" in told


@pytest.mark.parametrize("value", [-1, float("nan"), "4", None, True])
def test_a_size_that_is_none_is_refused(value, tmp_path):
    with (
        pytest.raises(ValueError, match="max_gib must be positive"),
        record_qkv(CASES["cogvideox"].build(), tmp_path / "q", max_gib=value),
    ):
        pass
