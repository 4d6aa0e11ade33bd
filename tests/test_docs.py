"""The READMEs: their examples run, their commands and names exist, and both languages say the same."""

import ast
import functools
import importlib
import io
import json
import re
import shlex
import tokenize
from pathlib import Path

import diffusers
import pytest
import tiny
import torch
import yaml
from lora_files import lora_file

import psa_diffusers
from psa_diffusers.lora import files as lora_source
from psa_diffusers.presets import list_model_entries, list_presets, load_preset

ROOT = Path(__file__).parents[1]
ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md"))
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))}
OWN_PRESETS = {"baseline", "psa_cover", "psa_fast", "psa_quality"}
SMALL = {"height": 96, "width": 112, "num_frames": 9, "max_sequence_length": tiny.TEXT_TOKENS}


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def parser_of(program):
    """What reads the options of a program: of a thin script that of the command behind it."""
    main = importlib.import_module(program).main
    return importlib.import_module(main.__module__).parse


def stand_in(pipeline_class, build, steps=None):
    """A class that answers `from_pretrained` with a tiny pipeline, which runs any call at a small size."""

    class Small(pipeline_class):
        @classmethod
        def from_pretrained(cls, name, **kwargs):
            return build(cls)

        def to(self, *args, **kwargs):
            return self

        @functools.wraps(pipeline_class.__call__)
        def __call__(self, *args, **kwargs):
            small = SMALL if steps is None else {**SMALL, "num_inference_steps": steps}
            return super().__call__(*args, **{**kwargs, **small})

    return Small


@torch.no_grad()
def test_the_python_examples_run_one_after_the_other(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diffusers, "WanPipeline", stand_in(diffusers.WanPipeline, tiny.wan, steps=16))
    # as many heads as the 5b model has: presets are found by the size of the denoiser
    big = functools.partial(tiny.cogvideox, heads=48)
    monkeypatch.setattr(diffusers, "CogVideoXPipeline", stand_in(diffusers.CogVideoXPipeline, big))
    monkeypatch.setattr(
        lora_source, "_local_file", lambda *args: lora_file(tmp_path, "cogvideox", width=48 * 16, rank=64)
    )
    names, seen = {}, []
    for code in blocks(ENGLISH, "python"):
        exec(compile(code, "README.md", "exec"), names)
        seen.append(names["video"])
    assert [len(video) for video in seen] == [9, 9, 9, 9]
    assert (tmp_path / "report.png").stat().st_size > 1000
    assert "24 sparse, 40 dense" in capsys.readouterr().out, "10 of 16 steps warm up; 2 layers, 2 passes a step"


def test_the_preset_of_the_readme_is_one(tmp_path):
    (code,) = blocks(ENGLISH, "yaml")
    path = tmp_path / "my.yaml"
    path.write_text(code, encoding="utf-8")
    preset = load_preset("CogVideo_5b", "my_preset", config=path)
    assert preset.levels == ((1, 0.1), (4, 0.3), (0, 1.0))
    assert preset.replace(steps={"0:10%": {"type": "dense"}}).at(0, 50).type == "dense", "the example in the text"


def commands():
    lines = "".join(blocks(ENGLISH, "bash")).splitlines()
    return [line.split("#")[0].strip() for line in lines if line.strip()]


@pytest.mark.parametrize("command", commands())
def test_the_commands_are_understood(command, capsys):
    program, *args = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{args[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        return
    assert program == "python"
    if args[0] == "-m":
        del args[0]
    else:
        assert (ROOT / args[0]).is_file()
    parse = parser_of(args[0].removesuffix(".py").replace("/", "."))
    if "--help" in args:
        with pytest.raises(SystemExit, match=r"^0$"):
            parse(args[1:])
        return
    options = parse(args[1:])
    assert options.model in list_model_entries()


def test_options_in_the_text_exist(capsys):
    with pytest.raises(SystemExit):
        parser_of("scripts.generate")(["--help"])
    known = set(re.findall(r"--[a-z_]+", capsys.readouterr().out))
    for name, path in PAGES.items():
        text = path.read_text(encoding="utf-8")
        for line in re.findall(r"`(--[^`]+)`", text):
            assert set(re.findall(r"--[a-z_]+", line)) <= known, f"{name}: {line}"


def test_every_public_name_is_explained():
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES.values())
    missing = [name for name in psa_diffusers.__all__ if not re.search(rf"\b{name}\b", text)]
    assert not missing, f"neither the READMEs nor docs/ mention {missing}"


def test_names_in_the_examples_of_the_tables_are_public():
    calls = [code for code in re.findall(r"`([a-z_]+\(.*?\))`", ENGLISH) if not code.startswith("steps")]
    assert len(calls) > 5
    for code in calls:
        (statement,) = ast.parse(code).body
        called = {node.func.id for node in ast.walk(statement) if isinstance(getattr(node, "func", None), ast.Name)}
        assert called <= set(psa_diffusers.__all__), code


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["english", "chinese"])
def test_the_tables_hold_every_published_preset(text):
    rows = dict(re.findall(r"^\| [^|]+ \| `([^`]+)` \| ([^|]+) \|$", text, flags=re.MULTILINE))
    presets = list_presets()
    published = {section for section, names in presets.items() if set(names) - OWN_PRESETS}
    assert set(rows) == published - {"default", "demo"}
    for section, names in rows.items():
        assert set(names.split(", ")) == set(presets[section]) - OWN_PRESETS
        assert OWN_PRESETS <= set(presets[section])
    for model in list_model_entries():
        assert model in text


def same_for_all_readers(code, language):
    """A block without its comments and without what people read in strings."""
    if language == "python":
        tokens = tokenize.generate_tokens(io.StringIO(code).readline)
        return [token.string for token in tokens if token.type != tokenize.COMMENT]
    if language == "yaml":
        section = yaml.safe_load(code)
        for preset in section["CogVideo_5b"]["attention_configs"].values():
            preset.pop("description")
        return section
    return [line.split("#")[0].rstrip() for line in code.splitlines()]


@pytest.mark.parametrize("language", ["python", "bash", "yaml", "bibtex"])
def test_both_readmes_have_the_same_examples(language):
    english, chinese = (
        [same_for_all_readers(code, language) for code in blocks(text, language)] for text in (ENGLISH, CHINESE)
    )
    assert english
    assert english == chinese


def test_both_readmes_say_as_much():
    assert [len(re.findall(pattern, ENGLISH, re.MULTILINE)) for pattern in ("^##+ ", r"^\|", r"\]\(")] == [
        len(re.findall(pattern, CHINESE, re.MULTILINE)) for pattern in ("^##+ ", r"^\|", r"\]\(")
    ]


@pytest.mark.parametrize("page", PAGES)
def test_files_and_modules_in_the_text_exist(page):
    text = PAGES[page].read_text(encoding="utf-8")
    files = re.findall(r"(?<![\w./])(?:scripts|tests|psa_diffusers)/[\w/]+(?:\.\w+)?(?![\w<])", text)
    missing = [name for name in files if not (ROOT / name).exists()]
    modules = re.findall(r"(?<![\w.])-m (scripts[\w.]*)", text)
    missing += [name for name in modules if not (ROOT / f"{name.replace('.', '/')}.py").is_file()]
    assert not missing, f"{page} speaks of {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = PAGES[page].read_text(encoding="utf-8")
    targets = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [target for target in targets if target and not (PAGES[page].parent / target).exists()]
    assert not missing, f"{page} links to {missing}"


def test_python_in_the_docs_imports_what_exists():
    pinned = re.search(r"^diffusers==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[1]
    packages = ["psa_diffusers"] + ["diffusers"] * (diffusers.__version__ == pinned)  # an older one has less
    for name, path in PAGES.items():
        for code in blocks(path.read_text(encoding="utf-8"), "python"):
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in packages:
                    module = importlib.import_module(node.module)
                    for alias in node.names:
                        assert hasattr(module, alias.name), f"{name}: {node.module} has no {alias.name}"


def table_rows(text):
    """The cells of every row of the tables in a text."""
    return [
        tuple(cell.strip() for cell in line.strip("|").split("|")) for line in text.splitlines() if line[:2] == "| "
    ]


def gpu_row(one):
    """A measurement as docs/developer/benchmarks.md has it: the last three cells are known of our own kernels only."""
    cells = [one["shape"], one.get("mix") or one["provider"], f"{one['density']:.3f}", f"{one['relative_l1']:.4f}"]
    cells += [f"{one['ms']:.2f}", f"{one['speedup']:.2f}"]
    if one["provider"] != "psa_diffusers":
        return (*cells, "–", "–", "–")
    planning = f"{one['planning_share']:.0%}"
    return (*cells, f"{one['attend_over_dense_rate']:.2f}", planning, f"{one['extra_memory_over_qkv']:.2f}")


def test_the_gpu_tables_are_the_data():
    """Each row of the page is a measurement, rounded, and each measurement but FlashAttention-2 a row."""
    data = (ROOT / "docs/benchmarks/gpu_h200.jsonl").read_text(encoding="utf-8")
    measured = [gpu_row(json.loads(line)) for line in data.splitlines()]
    measured = [row for row in measured if row[1] != "dense FlashAttention-2"]
    text = (ROOT / "docs/developer/benchmarks.md").read_text(encoding="utf-8").partition("## GPU")[2]
    rows = [row for row in table_rows(text) if row[0] != "shape"]
    assert len(rows) > 30
    assert sorted(rows) == sorted(measured)


def test_what_a_row_of_queries_costs_is_the_data():
    """The line through the two densities of a mix, as docs/developer/kernel.md has it for each shape."""
    data = (ROOT / "docs/benchmarks/gpu_h200.jsonl").read_text(encoding="utf-8").splitlines()
    data = [json.loads(line) for line in data]
    text = (ROOT / "docs/developer/kernel.md").read_text(encoding="utf-8").partition("**Bytes.**")[0]
    head, *rows = table_rows(text)
    assert {row[0] for row in rows} == {one["shape"] for one in data}
    for shape, *cells in rows:
        of_shape = [one for one in data if one["shape"] == shape]
        dense = next(one["ms"] for one in of_shape if one["provider"] == "dense cuDNN")
        for mix, cell in zip(head[1:], cells, strict=True):
            far, near = (one for one in of_shape if one.get("mix") == mix.strip("`"))
            far_ms, near_ms = (one["stage_ms"]["attend"] for one in (far, near))
            slope = (far_ms - near_ms) / (far["density"] - near["density"])
            # microseconds of one of the 132 multiprocessors, which share the blocks of 128 queries
            a_row = 1000 * 132 / (-(-far["tokens"] // 128) * far["heads"])
            fixed = (far_ms - slope * far["density"]) * a_row
            assert cell == f"{fixed:.0f} of {far_ms * a_row:.0f}, {dense / slope:.2f}"


def test_the_table_of_presets_is_the_data():
    """Every evaluation of a demo model's clips is a row of docs/developer/miniature.md, rounded."""
    measured = []
    for line in (ROOT / "docs/benchmarks/miniature_presets.jsonl").read_text(encoding="utf-8").splitlines():
        one = json.loads(line)
        for name, row in one["rows"].items():
            name, is_dense = name.partition("@")[0], name.startswith("dense")
            cells = [f"`{one['model']}`", str(one["prompts"]), name if is_dense else f"`{name}`", str(row["steps"])]
            cells += ["1" if is_dense else f"{row['density']:.3f}".lstrip("0"), f"{100 * row['adherence']:.1f}"]
            cells += [f"{row['psnr']:.1f}", f"{row['ssim']:.3f}".lstrip("0")] if "psnr" in row else ["", ""]
            measured.append(tuple(cells))
    text = (ROOT / "docs/developer/miniature.md").read_text(encoding="utf-8")
    assert table_rows(text.partition("### Presets")[2].partition("\n#")[0])[1:] == measured


def test_the_seconds_of_whole_videos_are_those_of_the_measurements():
    lines = (ROOT / "docs/benchmarks/whole_video.jsonl").read_text(encoding="utf-8").splitlines()
    measured = {}
    for line in map(json.loads, lines):
        measured.setdefault((line["model"].split("-")[0], line["height"], line["setting"]), {})[line["preset"]] = line
    page = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+?)-\S+, (\d+)p, \d+ frames \| (?:blocks )?(\w+) \| (.*) \|$", page, re.MULTILINE)
    shown = {}
    for line in measured.values():
        dense = line["dense"]
        shown[dense["seconds"]] = [
            f"{line[p]['seconds']:.1f} s, {line[p]['speedup']:.2f}×" for p in ("psa_cover", "psa_fast")
        ]
    assert len(rows) == len(measured)
    for *_, cells in rows:
        dense, *sparse = cells.split(" | ")
        assert sparse in [found for seconds, found in shown.items() if dense == f"{seconds:.1f} s"]
