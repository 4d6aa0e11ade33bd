"""Which kernel torch would try first in the dense calls of our processors. What a GPU then runs is a GPU test."""

import threading

import pytest
import torch
import torch.nn.functional as F
from guests import one_of_each
from tiny import CASES, TINY_PRESET
from torch.nn.attention import SDPBackend, sdpa_kernel

from psa_diffusers.pipelines.enable import disable_psa, enable_psa
from psa_diffusers.processors import dense

FASTEST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def hopper(monkeypatch):
    """As if every device were a Hopper GPU."""
    monkeypatch.setattr(dense, "_is_open_hopper", lambda kind, index: True)


def order():
    """The kernels that are on, in the order in which torch tries them."""
    return torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)


@pytest.fixture
def orders(monkeypatch):
    """That order in each call of attention, whoever makes it."""
    seen, real = [], F.scaled_dot_product_attention

    def noting(*args, **kwargs):
        seen.append(order())
        return real(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    return seen


def capability(monkeypatch, major):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (major, 0))
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.mark.parametrize(("major", "expected"), [(8, False), (9, True), (10, False)])
def test_hopper_is_known_by_its_capability(major, expected, monkeypatch):
    capability(monkeypatch, major)
    assert dense._is_open_hopper("cuda", 0) == expected
    assert not dense._is_open_hopper("cpu", None)


def test_a_rocm_device_is_no_hopper(monkeypatch):
    capability(monkeypatch, 9)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not dense._is_open_hopper("cuda", 0)


@pytest.mark.parametrize("off", FASTEST)
def test_a_kernel_that_the_user_switched_off_stays_off(off, monkeypatch):
    capability(monkeypatch, 9)
    with sdpa_kernel([kernel for kernel in FASTEST if kernel != off]):
        assert not dense._is_open_hopper("cuda", 0)
    assert dense._is_open_hopper("cuda", 0)


@one_of_each
def test_dense_self_attention_tries_the_fastest_first_and_nothing_else_changes(name, hopper, orders):
    before, pipe = order(), enable_psa(CASES[name].build(), **TINY_PRESET)
    pipe.transformer.register_forward_pre_hook(lambda *args: orders.clear())
    CASES[name].run(pipe, steps=1)
    sparse_step = list(orders)
    assert FASTEST not in sparse_step
    disable_psa(pipe)
    enable_psa(pipe, **{**TINY_PRESET, "warmup_steps": 1})
    CASES[name].run(pipe, steps=2, callback_on_step_end=lambda *args: args[3])
    assert orders == sparse_step, "the step after the dense one"
    seen = []
    CASES[name].run(pipe, steps=1, callback_on_step_end=lambda *args: (seen.extend(orders), args[3])[1])
    assert seen.count(FASTEST) == 2  # of two layers
    assert all(kernels in (FASTEST, before) for kernels in seen)
    assert order() == before


@one_of_each
def test_after_disable_psa_torchs_own_order_stands(name, hopper, orders):
    pipe = enable_psa(CASES[name].build(), "baseline")
    CASES[name].run(pipe, steps=1)
    assert FASTEST in orders
    disable_psa(pipe)
    orders.clear()
    CASES[name].run(pipe, steps=1)
    assert orders
    assert FASTEST not in orders


@one_of_each
def test_elsewhere_torchs_own_order_stands(name, orders):
    CASES[name].run(enable_psa(CASES[name].build(), "baseline"), steps=1)
    assert set(map(tuple, orders)) == {tuple(order())}


def test_an_attention_that_raises_leaves_the_order_as_it_was(hopper, monkeypatch):
    def broken(*args, **kwargs):
        raise KeyboardInterrupt

    before, pipe = order(), enable_psa(CASES["wan2.1"].build(), "baseline")
    monkeypatch.setattr(pipe.transformer.blocks[0].attn1.processor, "original", broken)
    with pytest.raises(KeyboardInterrupt):
        CASES["wan2.1"].run(pipe)
    assert order() == before


def test_of_two_threads_the_last_one_puts_the_order_back(hopper):
    before, x, seen = order(), torch.ones(1), []
    first, second = threading.Event(), threading.Event()

    def overlap():
        with dense.fastest_dense(x):
            first.set()
            second.wait(10)
            seen.append(order())
        seen.append(order())

    thread = threading.Thread(target=overlap)
    thread.start()
    first.wait(10)
    with dense.fastest_dense(x):
        second.set()
        thread.join(10)
        seen.append(order())
    assert seen == [FASTEST] * 3
    assert order() == before


def test_an_attention_backend_of_the_user_wins(hopper, orders):
    pipe = enable_psa(CASES["wan2.1"].build(), "baseline")
    for block in pipe.transformer.blocks:
        block.attn1.processor._attention_backend = "_native_math"
    CASES["wan2.1"].run(pipe, steps=1, guidance=1.0)
    assert orders.count([SDPBackend.MATH]) == 2  # layers
    assert FASTEST not in orders


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "mask", "grouped"])
def test_every_call_finds_a_kernel(kind, dtype, hopper, rng):
    q, k, v = (torch.randn(1, 4, 24, 16, generator=rng).to(dtype) for _ in range(3))
    given = {"attn_mask": torch.rand(24, 24, generator=rng) > 0.5} if kind == "mask" else {}
    if kind == "grouped":
        k, v, given = k[:, :2], v[:, :2], {"enable_gqa": True}
    with dense.fastest_dense(q):
        out = F.scaled_dot_product_attention(q, k, v, **given)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, **given))


@one_of_each
def test_compiled_it_stays_one_graph(name, hopper):
    torch._dynamo.reset()
    before, pipe = order(), enable_psa(CASES[name].build(), **{**TINY_PRESET, "warmup_steps": 1})
    eager, graphs = CASES[name].run(pipe), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend=backend)
    assert torch.equal(CASES[name].run(pipe), eager)
    changes = [str(graph.graph).count("_sdpa_kernel](") for graph in graphs]
    assert changes == [2 * 2, 0]  # there and back in two layers, in the dense graph; none in the sparse one
    assert order() == before
    torch._dynamo.reset()
