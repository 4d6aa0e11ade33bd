"""The miniature world, its evaluator, and the three scripts that train and judge on it."""

import argparse
import contextlib
import copy
import io
import json
import random
import shutil
from dataclasses import dataclass

import pytest
import torch
from diffusers import CogVideoXPipeline, DiffusionPipeline
from safetensors.torch import load_file, save_file

from psa_diffusers import enable_psa, load_psa_lora
from psa_diffusers.cli import opening
from psa_diffusers.cli.demo import build_demo_pipeline, check_hashes
from scripts.miniature import evaluate, measure, train_demo, train_lora, training, world
from scripts.miniature import model as miniatures

SCRIPTS = {script.__name__.rpartition(".")[2]: script for script in (evaluate, train_demo, train_lora)}


@dataclass
class Done:
    """What a script printed."""

    stdout: str
    stderr: str


def drawn(scene, seed=0, frames=25):
    packed = world.pack([scene], random.Random(seed))
    return (world.render(packed, frames=frames, size=128)[0].permute(1, 2, 3, 0) + 1) / 2


def run_script(name, *args, code=0):
    """Run a script's `main` here: a process of its own would spend its time on imports."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            ended = SCRIPTS[name].main([str(arg) for arg in args])
        except SystemExit as exit_:
            ended = exit_.code
    assert ended == code, out.getvalue() + err.getvalue()
    return Done(out.getvalue(), err.getvalue())


# --- the world


def test_every_prompt_can_be_read_back():
    rng = random.Random(0)
    scenes = [world.draw_scene(rng, held_out=number % 2 == 0) for number in range(2000)]
    assert all(world.parse_prompt(scene.prompt) == scene for scene in scenes)
    words = {word for scene in scenes for word in scene.prompt.replace(",", " ,").split()}
    assert words == set(world.WORDS)
    with pytest.raises(ValueError, match="an example: 'a red circle"):
        world.parse_prompt("a red ball rolls over a field")
    with pytest.raises(ValueError, match="did you mean 'two red circles move left"):
        world.parse_prompt("two red circle moves left over a plain gray background")


def test_no_training_scene_shows_what_is_held_out():
    rng = random.Random(1)
    scenes = [world.draw_scene(rng) for _ in range(2000)]
    assert not any(thing.held_out for scene in scenes for thing in scene.things)
    seen = {thing for scene in scenes for thing in scene.things}
    pairs = [{pair for thing in seen for pair in [(getattr(thing, a), getattr(thing, b))]}
             for a, b in (("color", "shape"), ("color", "motion"), ("shape", "motion"))]  # fmt: skip
    assert [len(pair) for pair in pairs] == [24, 30, 20], "every two attributes meet in training"
    held = world.held_out_scenes(64)
    assert held == world.held_out_scenes(64)
    assert all(scene.things[0].held_out for scene in held)
    assert len({scene.prompt for scene in held}) == 64


def test_of_a_pair_the_first_is_on_the_left_or_above():
    rng = random.Random(5)
    pairs = [scene for scene in (world.draw_scene(rng) for _ in range(400)) if scene.kind == "pair"]
    assert len(pairs) > 100
    for scene in pairs:
        first, second = world.pack([scene], rng)["things"][0, :2, 1:5]
        side_by_side = any(thing.motion in ("up", "down") for thing in scene.things)
        across = 0 if side_by_side else 1
        assert all(first[end + across] < second[end + across] for end in (0, 2)), scene.prompt


def test_a_clip_at_half_the_size_shows_the_same():
    packed = world.pack([world.parse_prompt(world.EXAMPLE)], random.Random(0))
    large, small = (world.render(packed, frames=5, size=size) for size in (128, 64))
    # edges are a pixel soft, which is half as much at twice the size
    assert (torch.nn.functional.avg_pool3d(large, (1, 2, 2)) - small).abs().mean() < 0.02


# --- the evaluator


def test_the_evaluator_errs_on_no_more_than_two_clips_in_a_hundred():
    scenes = world.held_out_scenes(50, seed=7)
    wrong = []
    for number, scene in enumerate(scenes):
        clip = drawn(scene, number)
        if number % 2:  # as soft and as noisy as a decoded one
            soft = torch.nn.functional.avg_pool2d(clip.permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1)
            clip = (soft + 0.03 * torch.randn(soft.shape, generator=torch.Generator().manual_seed(number))).clamp(0, 1)
        right = measure.compare(scene, measure.describe(clip))
        wrong += [(scene.prompt, name) for name, is_right in right.items() if not is_right]
    assert len({prompt for prompt, _ in wrong}) <= 1, wrong


SCENE = world.parse_prompt(
    "a red circle moves left in front of a blue square over a striped gray background, the camera pans left"
)
OTHERS = [
    ("a green circle moves left in front of a blue square over a striped gray background", {"color", "things"}),
    ("a red ring moves left in front of a blue square over a striped gray background", {"shape"}),
    ("a red circle moves up in front of a blue square over a striped gray background", {"motion"}),
    ("a red circle moves left in front of a blue triangle over a striped gray background", {"shape 2"}),
    ("a blue square stands still and a red circle moves left over a striped gray background", set()),
    ("a red circle moves left over a striped gray background", {"things"}),
    ("two red circles move left over a striped gray background", {"count", "things"}),
    ("a red circle moves left in front of a blue square over a dotted gray background", {"texture"}),
    ("a red circle moves left in front of a blue square over a striped teal background", {"ground"}),
    (f"{SCENE.prompt.removesuffix('left')}right", {"camera"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "wrong"), OTHERS, ids=[", ".join(sorted(wrong)) or "nothing" for _, wrong in OTHERS]
)
def test_the_evaluator_sees_what_is_wrong(prompt, wrong):
    seen = measure.describe(drawn(SCENE))
    right = measure.compare(world.parse_prompt(prompt), seen)
    found = {name for name, is_right in right.items() if not is_right}
    if "color" in wrong:
        assert wrong <= found, "nothing else of a thing that is not there can be right either"
    else:
        assert found == wrong


def test_the_evaluator_sees_who_is_in_front():
    packed = world.pack([SCENE], random.Random(0))
    packed["things"][:, :2] = packed["things"][:, [1, 0]]  # the square is drawn over the circle
    seen = measure.describe((world.render(packed, frames=25, size=128)[0].permute(1, 2, 3, 0) + 1) / 2)
    assert [name for name, is_right in measure.compare(SCENE, seen).items() if not is_right] == ["in front"]


def test_noise_shows_nothing():
    noise = torch.rand(9, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    assert not any(measure.compare(SCENE, measure.describe(noise))[name] for name in ("color", "shape", "motion"))


# --- training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_weights_learn_through_their_float32_copies(dtype):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1, bias=False)
    masters = training.MasterWeights(model, dtype)
    goal = torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    for step in range(800):
        inputs = torch.randn(32, 4)
        loss = (model(inputs.to(dtype)).float() - inputs @ goal.T).square().mean()
        loss.backward()
        masters.step(0.03 * (1 - step / 800))
    assert model.weight.dtype == dtype
    # steps of the last rate, 4e-5, are far below what bfloat16 can add to 3: the copies carried them
    assert (masters.masters[0] - goal).abs().max() < 0.02
    masters.load_average()
    assert model.weight.dtype == torch.float32
    assert (model.weight - goal).abs().max() < 0.2, "the average trails behind"


@pytest.fixture(scope="module", params=["cogvideox", "wan"])
def trained(request, tmp_path_factory):
    """Family and folder of a run that was stopped after 40 steps and went on to 50."""
    folder = tmp_path_factory.mktemp(request.param)
    args = ("--family", request.param, "--preset", "toy", "--output", folder, "--cpu", "--log_every", 0)
    args += ("--vae_minutes", 5, "--minutes", 5)
    run_script("train_demo", *args, "--max_steps", 40)
    first = json.loads((folder / "curve.json").read_text())["curve"]
    done = run_script("train_demo", *args, "--max_steps", 50)
    return request.param, folder, first, done.stdout


def losses(curve, part):
    return [point["loss"] for point in curve if point["part"] == part and "loss" in point]


def test_training_learns(trained):
    _, _, curve, _ = trained
    vae, transformer = losses(curve, "vae"), losses(curve, "transformer")
    assert len(vae) == len(transformer) == 40
    assert sum(vae[-5:]) < 0.75 * sum(vae[:5])
    assert sum(transformer[-10:]) < 0.95 * sum(transformer[:10])
    text = losses(curve, "text")
    assert text[-1] < 0.75 * text[0]


def test_training_from_a_state_that_was_kept_repeats_to_the_bit():
    rng = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    gradients = [[torch.randn(w.shape, generator=rng) for w in model.parameters()] for _ in range(4)]
    masters = training.MasterWeights(model, torch.bfloat16, matrices=lambda name, weight: name == "0.weight")

    def train(steps):
        for step in steps:
            for weight, gradient in zip(masters.weights, gradients[step], strict=True):
                weight.grad = gradient.to(weight.dtype)
            masters.step(0.1)
        return [x.clone() for x in (*masters.masters, *masters.weights, *masters.average.shadow_params)]

    train([0, 1])
    kept = copy.deepcopy(masters.state())
    first = train([2, 3])
    masters.load_state(kept)
    assert not all(map(torch.equal, first, train([])))
    assert all(map(torch.equal, first, train([2, 3])))


@pytest.mark.parametrize("family", list(miniatures.FAMILIES.values()), ids=lambda family: family.name)
def test_half_of_the_clips_are_noised_far(family):
    pipe = miniatures.build_pipeline(family, miniatures.SIZES["toy"])
    clean, noise = torch.randn(2, 4096, 1, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    noisy, timesteps, target = family.noised(pipe, clean, noise, torch.Generator().manual_seed(1))
    assert timesteps.min() >= 0
    assert timesteps.max() < 1000
    place = timesteps / 1000  # of the schedule; Wan shifts its own
    late = 0.8 if family.name == "cogvideox" else family.shift * 0.8 / (1 + (family.shift - 1) * 0.8)
    far = (place >= late).float().mean()
    assert abs(far - 0.6) < 5 * (0.6 * 0.4 / 4096) ** 0.5
    # what is predicted leads back from the noisy clip to the clean one
    if family.name == "cogvideox":
        signal, rest = family.coefficients(pipe, timesteps, clean)
        back = signal * noisy - rest * target
    else:
        back = noisy - place.view(-1, 1, 1, 1, 1) * target
    torch.testing.assert_close(back, clean, atol=1e-5, rtol=1e-5)


def test_muon_is_that_of_torch():
    ours, theirs = ([torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(n))) for n, shape in
                     enumerate([(32, 64), (64, 32), (32, 64), (64, 64)])] for _ in range(2))  # fmt: skip
    settings = {"lr": 2e-3, "momentum": 0.95, "weight_decay": 0.01}
    optimizers = training.Muon(ours, **settings), torch.optim.Muon(theirs, **settings, adjust_lr_fn="match_rms_adamw")
    before = [weight.detach().clone() for weight in ours]
    for step in range(5):
        for n, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(100 * step + n))
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, start in zip(ours, theirs, before, strict=True):
        moved = (other - start).abs().max()
        # both orthogonalise in bfloat16; products of a stack may round in another order
        assert (one - other).abs().max() <= 2**-6 * moved
        assert moved > 5e-4


def test_a_phrase_states_what_it_says():
    scenes = [world.parse_prompt(prompt) for prompt in (
        "two white rings stand still over a plain navy background",
        "a blue square moves up and a red circle moves down over a dotted brown background, the camera pans left",
        "a green triangle moves right in front of a yellow square over a checkered teal background",
    )]  # fmt: skip
    stated, words = miniatures.facts(scenes, 32)
    said = [
        [{world.FACTS[k] for k in token.nonzero()[:, 0].tolist()} for token in row[: int(mask.sum())]]
        for row, mask in zip(stated, words, strict=True)
    ]
    assert said[0] == 5 * [{"two", "white", "ring", "stands still"}] + 5 * [{"plain", "navy"}]
    assert said[1][:5] == 5 * [{"a", "blue", "square", "moves up", "first"}]
    assert said[1][5:11] == 6 * [{"a", "red", "circle", "moves down", "second"}]
    assert said[1][11:] == 10 * [{"dotted", "brown", "pans left"}]
    assert said[2][0] == {"a", "green", "triangle", "moves right", "in front"}
    assert said[2][5] == {"a", "yellow", "square", "stands still", "behind"}
    # a phrase for every token that the tokenizer makes, but the end
    ids = miniatures.token_ids([scene.prompt for scene in scenes], 32, miniatures.tokenizer())
    assert ((ids > 1).float() == words).all()


def test_training_goes_on_where_it_stopped(trained):
    _, folder, first, printed = trained
    curve = json.loads((folder / "curve.json").read_text())["curve"]
    assert "going on from" in printed
    assert curve[: len(first)] == first
    assert [point["step"] for point in curve[len(first) :]] == list(range(41, 51)), "the VAE is not trained again"


def test_a_trained_pipeline_loads_and_runs_with_psa(trained):
    family, folder, _, _ = trained
    pipe = DiffusionPipeline.from_pretrained(folder / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__name__.lower().startswith(family)
    enable_psa(pipe, "psa_cover", warmup_steps=0)
    # the text length of the pipeline itself
    size = {"height": 32, "width": 32, "num_frames": 9}
    video = pipe(
        world.EXAMPLE, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt", **size
    )
    assert video.frames.shape == (1, 9, 3, 32, 32)
    assert torch.isfinite(video.frames).all()
    stored = load_file(folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.float16}
    index = json.loads((folder / "pipeline" / "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"], "transformers 4 knows no other"


def test_words_of_the_grammar_are_known(trained):
    _, folder, _, _ = trained
    words = DiffusionPipeline.from_pretrained(folder / "pipeline").tokenizer
    scenes = world.held_out_scenes(200)
    ids = [words(scene.prompt).input_ids for scene in scenes]
    assert all(words.unk_token_id not in one for one in ids)
    assert max(map(len, ids)) <= 32
    assert len({tuple(one) for one in ids}) == 200


def test_a_damaged_file_is_refused(trained, tmp_path):
    family, folder, _, _ = trained
    pipe = build_demo_pipeline(folder / "pipeline", family=family)
    assert {part.dtype for part in (pipe.transformer, pipe.vae, pipe.text_encoder)} == {torch.float32}
    damaged = shutil.copytree(folder / "pipeline", tmp_path / "pipeline")
    weights = damaged / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"expected SHA-256 \w{12}\.\.\., got"):
        build_demo_pipeline(damaged, family=family)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="install the package again"):
        check_hashes(damaged)


def test_a_run_can_start_from_another(trained, tmp_path):
    family, folder, _, _ = trained
    done = run_script(
        "train_demo", "--family", family, "--preset", "toy", "--output", tmp_path, "--init", folder / "pipeline",
        "--keep_vae", "--keep_text", "--max_steps", 1, "--cpu",
    )  # fmt: skip
    assert "starting from" in done.stdout
    wrong = run_script("train_demo", "--family", family, "--output", tmp_path, "--new_text", code=2)
    assert "mean something with --init only" in wrong.stderr
    assert not losses(json.loads((tmp_path / "curve.json").read_text())["curve"], "vae")
    before, after = (
        load_file(path / "vae" / "diffusion_pytorch_model.safetensors")
        for path in (folder / "pipeline", tmp_path / "pipeline")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """Folder of a CogVideoX miniature of toy size."""
    folder = tmp_path_factory.mktemp("miniature")
    run_script("train_demo", "--family", "cogvideox", "--preset", "toy", "--output", folder, "--max_steps", 12, "--cpu")
    return folder / "pipeline"


@pytest.fixture(scope="module")
def loras(miniature, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    done = run_script(
        "train_lora", "--model", miniature, "--output", folder, "--attention_preset", "psa_cover", "--rank", 4,
        "--batch", 2, "--rollout_batch", 3, "--max_steps", 6, "--learning_rate", 0.02, "--log_every", 0, "--cpu",
    )  # fmt: skip
    return folder, done.stdout


def test_the_lora_has_the_published_layout(loras):
    folder, _ = loras
    for name in ("psa", "dense"):
        weights = load_file(folder / name / "pytorch_lora_weights.safetensors")
        assert set(weights) == {
            f"transformer.transformer_blocks.0.attn1.{part}.lora_{half}.weight"
            for part in ("to_q", "to_k", "to_v", "to_out.0")
            for half in "AB"
        }
        assert {weight.dtype for weight in weights.values()} == {torch.float16}
        check_hashes(folder / name)


def test_the_student_follows_the_teacher(loras):
    folder, _ = loras
    curve = json.loads((folder / "curve.json").read_text())
    assert curve["timesteps"] == [999, 749, 499, 249]
    steps = {part: losses(curve["curve"], part) for part in ("dense", "psa", "control")}
    assert {len(values) for values in steps.values()} == {6}, "the control takes as many steps"
    assert steps["psa"][-1] < steps["dense"][0]


def test_the_lora_loads_and_changes_what_four_steps_give(loras, miniature):
    folder, _ = loras
    pipe = CogVideoXPipeline.from_pretrained(miniature)
    pipe.set_progress_bar_config(disable=True)

    def run():
        call = {"num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 32, "output_type": "latent"}
        return pipe(world.EXAMPLE, generator=torch.Generator().manual_seed(0), **call).frames

    before = run()
    load_psa_lora(pipe, folder / "psa", few_steps=False)
    assert (run() - before).abs().max() > 1e-3
    pipe.unload_lora_weights()
    assert torch.equal(run(), before)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--teacher_steps", "30"], "multiple of 4 that divides 1000, got 30"),
        (["--rank", "64"], "would be taken for the published LoRA"),
    ],
    ids=["teacher-steps", "rank"],
)
def test_settings_of_the_lora_that_cannot_work_are_refused(args, message):
    assert message in run_script("train_lora", "--model", "x", "--output", "y", *args, code=2).stderr


def test_an_unknown_preset_is_refused_before_the_teacher_runs(tmp_path, capsys):
    args = ["--model", "demo", "--output", str(tmp_path), "--cpu", "--attention_preset", "psa_4step"]
    with pytest.raises(SystemExit, match="Did you mean 'psa_4steps'"):
        train_lora.main(args)
    assert "teacher" not in capsys.readouterr().out


# --- evaluation


def test_the_evaluation_compares_rows(loras, miniature, tmp_path):
    folder, _ = loras
    done = run_script(
        "evaluate", "--model", miniature, "--prompts", 2, "--num_inference_steps", 3, "--warmup_steps", 0,
        "--rows", "rendered", "dense", "psa_cover", "restored", "psa:psa_cover@4", "--lora", f"psa={folder / 'psa'}",
        "--json", tmp_path / "all.json", "--sheet", tmp_path / "sheet.png", "--record", tmp_path / "qkv.safetensors",
    )  # fmt: skip
    rows = json.loads((tmp_path / "all.json").read_text())["rows"]
    assert rows["dense"]["density"] == 1
    assert "psnr" not in rows["dense"], "it is the reference, the first row of the model's own"
    assert "psnr" not in rows["rendered"], "there was no reference yet"
    assert rows["psa_cover"]["density"] < 1
    assert rows["psa_cover"]["psnr"] > rows["restored"]["psnr"]
    assert (rows["psa:psa_cover@4"]["steps"], rows["psa:psa_cover@4"]["guidance"]) == (4, 1)
    assert [len(row["prompts"]) for row in rows.values()] == [2] * 5
    assert all(name in done.stdout for name in rows)
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    recorded = load_file(tmp_path / "qkv.safetensors")
    assert all(tensor.shape[-1] == 32 for tensor in recorded.values())


@pytest.mark.parametrize("name", ["demo", "demo_lora", "demo_wan", "DEMO_WAN"])
def test_scripts_ask_the_demo_models_in_words_that_they_know(name):
    prompts = opening.read_prompts(argparse.Namespace(prompt_file=None), name)
    assert [world.parse_prompt(prompt).prompt for prompt in prompts] == prompts == list(opening.DEMO_PROMPTS)


def test_what_the_evaluation_cannot_do_is_said(miniature, tmp_path):
    assert "asks for a LoRA" in run_script("evaluate", "--model", "x", "--rows", "a:dense", code=2).stderr
    assert "no row" in run_script("evaluate", "--model", "x", "--rows", "dense@", code=2).stderr
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat on a skateboard\n")
    assert (
        "no prompt of the miniature world"
        in run_script("evaluate", "--model", miniature, "--prompt_file", prompts, code=2).stderr
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_answers_without_loading_anything(name):
    assert "python -m scripts.miniature." in run_script(name, "--help").stdout


def test_damaged_lora_is_refused(loras, tmp_path):
    folder, _ = loras
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    (tmp_path / "hashes.json").write_bytes((folder / "psa" / "hashes.json").read_bytes())
    with pytest.raises(ValueError, match="SHA-256"):
        check_hashes(tmp_path)
