"""No file format that can run code is ever opened: read from the sources, and tried with files that would run some."""

import ast
import json
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch

import psa_diffusers
from psa_diffusers import load_preset
from psa_diffusers.calibration import recover_recording
from psa_diffusers.cli.generation import load_pipeline, resolve_model
from psa_diffusers.lora import load_psa_lora
from psa_diffusers.presets import load_model_entry

PACKAGE = Path(psa_diffusers.__file__).parent

# modules whose files are programs
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "code"}
# calls, by the end of their dotted name; a name alone is a function of Python
CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "torch.jit.load", "torch.hub.load", "torch.package",
    "np.load", "numpy.load", "np.fromregex", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load",
    "yaml.unsafe_load_all", "yaml.full_load_all", "pd.read_pickle", "os.system", "os.popen",
}  # fmt: skip
NAMES = {"UnsafeLoader", "FullLoader", "CUnsafeLoader", "CFullLoader"}
# switches that let code or its formats in
SWITCHES = {"trust_remote_code": True, "allow_pickle": True, "shell": True, "weights_only": False}


def faults(tree):
    """What in a source opens a format that can run code, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            names = [alias.name for alias in node.names]
            yield from (f"line {node.lineno}: {name}" for name in modules if name.partition(".")[0] in MODULES)
            yield from (f"line {node.lineno}: {name}" for name in names if name in NAMES)
            yield from (f"line {node.lineno}: {m}.{n}" for m in modules for n in names if f"{m}.{n}" in CALLS)
        elif isinstance(node, ast.Attribute) and node.attr in NAMES:
            yield f"line {node.lineno}: {node.attr}"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            switches = {keyword.arg: getattr(keyword.value, "value", keyword) for keyword in node.keywords}
            if called in CALLS:
                yield f"line {node.lineno}: {called}"
            yield from (f"line {node.lineno}: {key}" for key, on in SWITCHES.items() if switches.get(key, not on) == on)
            if called.endswith(".from_pretrained") and switches.get("use_safetensors") is not True:
                yield f"line {node.lineno}: {called} without use_safetensors=True"


def test_no_source_opens_a_format_that_can_run_code():
    sources = sorted(PACKAGE.rglob("*.py"))
    assert len(sources) > 50, "the test must see the sources"
    found = [
        f"{path.relative_to(PACKAGE)}, {fault}"
        for path in sources
        for fault in faults(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "import torch\ntorch.load(path)",
        "from torch import load",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "loader = yaml.UnsafeLoader",
        "from yaml import FullLoader",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "Pipeline.from_pretrained(path)",
        "Pipeline.from_pretrained(path, use_safetensors=None)",
        "Pipeline.from_pretrained(path, use_safetensors=True, trust_remote_code=True)",
    ],
)
def test_the_search_finds(source):
    assert list(faults(ast.parse(source)))


@pytest.mark.parametrize(
    "source", ["re.compile(text)", "torch.compile(f)", "json.load(f)", "P.from_pretrained(p, use_safetensors=True)"]
)
def test_the_search_lets_be(source):
    assert not list(faults(ast.parse(source)))


# files that would run code


@dataclass(frozen=True)
class Program:
    """What a pickle of this does when it is loaded: it makes a folder."""

    folder: str

    def __reduce__(self):
        return Path.mkdir, (Path(self.folder),)


def save_with_torch(program, path):
    torch.save({"weight": program}, path)


def save_with_torch_of_old(program, path):
    torch.save({"weight": program}, path, _use_new_zipfile_serialization=False)


def save_with_pickle(program, path):
    path.write_bytes(pickle.dumps(program))


def save_as_yaml(program, path):
    path.write_text(f"default: !!python/object/apply:os.mkdir ['{program.folder}']\n", encoding="utf-8")


SAVERS = [save_with_torch, save_with_torch_of_old, save_with_pickle, save_as_yaml]


@pytest.fixture
def ran(tmp_path):
    """The folder that is there when code of a file ran."""
    return tmp_path / "ran"


def test_the_files_run_code_where_they_are_loaded(tmp_path, ran):
    save_with_pickle(Program(str(ran)), tmp_path / "file")
    pickle.loads((tmp_path / "file").read_bytes())
    assert ran.is_dir()
    ran.rmdir()
    save_with_torch(Program(str(ran)), tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert ran.is_dir()


def offer_as_lora(path):
    load_psa_lora(tiny.wan(), path)


def offer_as_folder_with_a_lora(path):
    load_psa_lora(tiny.wan(), path.parent, weight_name=path.name)


def offer_as_recording(path):
    for name in (f"{path.name}.part", f"{path.name}.part.jsonl"):
        shutil.copy(path, path.with_name(name))
    recover_recording(path)


def offer_as_presets(path):
    load_preset("default", config=path)


def offer_as_models(path):
    load_model_entry("demo", path)


@pytest.mark.parametrize("name", ["file.safetensors", "file.bin", "file.ckpt", "file.yaml"])
@pytest.mark.parametrize("save", SAVERS)
@pytest.mark.parametrize(
    "offer",
    [offer_as_lora, offer_as_folder_with_a_lora, offer_as_recording, offer_as_presets, offer_as_models],
)
def test_a_file_that_would_run_code_is_refused(offer, save, name, tmp_path, ran):
    path = tmp_path / name
    save(Program(str(ran)), path)
    with pytest.raises((ValueError, FileNotFoundError)):
        offer(path)
    assert not ran.exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline as a user has it on disk."""
    where = tmp_path_factory.mktemp("pipeline")
    tiny.wan().save_pretrained(where)
    return where


def load_folder(folder):
    return load_pipeline(resolve_model(str(folder)), device="cpu")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_pickled_weights_of_a_pipeline_are_not_opened(part, folder, tmp_path, ran):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (weights,) = (copy / part).glob("*.safetensors")
    weights.unlink()
    name = "pytorch_model.bin" if part == "text_encoder" else f"{weights.stem}.bin"
    save_with_torch(Program(str(ran)), copy / part / name)
    with pytest.raises((ValueError, OSError), match="safetensors"):
        load_folder(copy)
    assert not ran.exists()


@pytest.mark.parametrize("part", ["_class_name", "transformer"])
def test_code_beside_the_weights_is_not_run(part, folder, tmp_path, ran):
    copy = shutil.copytree(folder, tmp_path / "copy")
    index = json.loads((copy / "model_index.json").read_text(encoding="utf-8"))
    index[part] = ["mine", "Mine"]
    (copy / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    place = copy if part == "_class_name" else copy / part
    lines = ["from pathlib import Path", f"Path({str(ran)!r}).mkdir()", "from diffusers import WanPipeline as Mine"]
    (place / "mine.py").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises((ValueError, OSError)):
        load_folder(copy)
    assert not ran.exists()
