"""PSA in compiled denoisers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cells import BIT, ONE, SPARSE, alone, build, composes, run

from psa_diffusers.pipelines.enable import disable_psa, enable_psa


@composes()
def test_compiled_whole(name, order):
    def technique(pipe):
        pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend="eager")

    return _check_compiled(name, technique, order)


@composes()
def test_compiled_blocks(name, order):
    def technique(pipe):
        if name == "cogvideox":
            for block in pipe.transformer.transformer_blocks:
                block.compile(fullgraph=True, backend="eager")
        else:
            pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")

    return _check_compiled(name, technique, order)


def _check_compiled(name: str, technique: Callable[[Any], Any], order: str) -> str:
    torch._dynamo.reset()
    pipe = build(name)
    if order == "before":
        technique(pipe)
    enable_psa(pipe, **SPARSE)  # no report: it breaks the graph at each self-attention
    if order == "after":
        technique(pipe)
    assert torch.equal(run(pipe, name), alone(name, "sparse")[0])
    disable_psa(pipe)
    assert torch.equal(run(pipe, name), alone(name, "dense")[0])
    if order == "after":  # once: tracing is what takes long here
        enable_psa(pipe, **ONE)
        assert torch.equal(run(pipe, name), alone(name, "one")[0])
    torch._dynamo.reset()
    return BIT
