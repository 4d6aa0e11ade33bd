"""Backends are interchangeable: the same files, names and signatures, read from the sources, and one place picks."""

import ast
from pathlib import Path

import pytest
import torch

from psa_diffusers import attention
from psa_diffusers.ops import reference, training
from psa_diffusers.ops.layout import flat_layout

PACKAGE = Path(__file__).parents[2] / "psa_diffusers"
OPS = PACKAGE / "ops"
ONLY_TRITON = {"attend_hopper.py", "launch.py", "tuning.py"}
SHARED = sorted(path.name for path in (OPS / "reference").glob("[a-z]*.py"))

# questions about a tensor's device, a gradient, or whether a kernel takes a call
QUESTIONS = {"is_cuda", "is_cpu", "requires_grad", "needs_grad", "takes"}

# where they are asked outside attention.py, and what for: none of them picks who computes but Hopper's own kernel
NO_CHOICE = {
    ("ops/triton/attend.py", "takes"): "the general kernel hands over to Hopper's, within the backend",
    ("ops/triton/launch.py", "is_cuda"): "which device and stream are current",
    ("ops/reference/attend.py", "requires_grad"): "a buffer is used again where no backward pass needs its copies",
    ("ops/reference/attend.py", "is_cpu"): "which precision SDPA takes beside half precision",
    ("ops/reference/importance.py", "is_cpu"): "how much fits the caches",
    ("lora/restore.py", "requires_grad"): "what a parameter was before a LoRA came",
    ("processors/sparse.py", "needs_grad"): "why a level map is not kept",
    ("processors/run.py", "is_cuda"): "whether a CUDA graph is being captured",
}


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def signatures(body):
    """Parameters (kinds, order, defaults, annotations) and result of each public function, `self` left out."""
    found = {}
    for node in body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            node.args.args = [x for x in node.args.args if x.arg != "self"]
            found[node.name] = f"({ast.unparse(node.args)}) -> {ast.unparse(node.returns) if node.returns else None}"
    return found


def protocol():
    types = parse(OPS / "types.py")
    return signatures(next(node for node in types.body if getattr(node, "name", "") == "Backend").body)


def exported(path):
    lists = [n.value for n in parse(path).body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"]
    return ast.literal_eval(lists[0])


def test_reference_and_triton_have_the_same_files():
    assert {path.name for path in (OPS / "triton").glob("[a-z]*.py")} == {*SHARED} | ONLY_TRITON
    assert len(SHARED) >= 6, "the test must see the files"


@pytest.mark.parametrize("name", SHARED)
def test_functions_of_one_name_have_one_signature(name):
    ours, theirs = (signatures(parse(OPS / room / name).body) for room in ("triton", "reference"))
    wanted = protocol()
    both = ours.keys() & theirs.keys()
    assert both & wanted.keys(), "every file has a stage that both offer"
    assert {key: ours[key] for key in both} == {key: theirs[key] for key in both}


def test_a_backend_offers_what_the_protocol_says():
    wanted = protocol()
    offered = [pair for name in SHARED for pair in signatures(parse(OPS / "reference" / name).body).items()]
    assert wanted.items() <= dict(offered).items()
    own = {key: value for key, value in signatures(parse(OPS / "training.py").body).items() if key in wanted}
    assert {"attend", "build_pyramid"} == own.keys()
    assert own.items() <= wanted.items()
    for path in (OPS / "reference" / "__init__.py", OPS / "triton" / "__init__.py", OPS / "training.py"):
        assert exported(path) == sorted(wanted), path


def test_one_place_picks_who_computes():
    asked = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(parse(path)):
            name = getattr(node, "attr", None) or getattr(node, "id", None)
            if name in QUESTIONS and path != PACKAGE / "attention.py":
                asked.add((path.relative_to(PACKAGE).as_posix(), name))
    assert asked == set(NO_CHOICE), "a choice of path belongs to attention.py; name here what is none"


@pytest.mark.parametrize("which", [None, "q", "k", "v"])
@pytest.mark.parametrize("fits", [True, False], ids=["mask-fits", "mask-too-large"])
def test_training_on_a_gpu_takes_its_own_backend(which, fits, monkeypatch):
    """Of tensors that say they are on a GPU: who pools, who plans, who attends."""

    class OnGPU(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(attention, "resolve_backend", lambda backend, *tensors: "torch")
    monkeypatch.setattr(training, "MASK_BYTES", 2**32 if fits else 0)
    qkv = {name: torch.zeros(1, 1, 64, 16).as_subclass(OnGPU) for name in "qkv"}
    if which:
        qkv[which].requires_grad_()
    chosen = attention.choose_backends(
        "auto", **qkv, layout=flat_layout(64, 32, 32, torch.device("cpu")), factors=(1, 4)
    )
    assert chosen.pooling is (training if which in ("k", "v") else reference)
    assert chosen.planning is reference
    assert chosen.attention is (training if which and fits else reference)


def test_the_size_of_the_mask_is_that_of_the_mask(rng, monkeypatch):
    q, k, v = (torch.randn(2, 2, 97, 16, generator=rng) for _ in range(3))
    layout = flat_layout(97, 32, 64, q.device)
    sizes, real = [], torch.nn.functional.scaled_dot_product_attention

    def attend(*args, attn_mask, **kwargs):
        sizes.append(attn_mask.nbytes)
        return real(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    pyramid = training.build_pyramid(k, v, layout, (1, 2, 64))
    level_map = torch.ones(2, 2, layout.num_query_blocks, layout.num_key_blocks, dtype=torch.int16)
    training.attend(q, k, v, pyramid, training.make_schedule(level_map, (1, 2, 64), 64), layout, 0.25)
    told = training.mask_bytes(q, layout, (1, 2, 64))
    assert told <= sizes[0] <= told * 1.1, "but for the alignment"
