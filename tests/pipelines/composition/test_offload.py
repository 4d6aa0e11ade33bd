"""PSA where weights wait elsewhere: offload of models, layers and groups."""

from __future__ import annotations

import functools
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from cells import CPU, check_exact, composes
from packaging.version import Version


@composes()
def test_model_offload(name, order):
    return check_exact(name, lambda pipe: pipe.enable_model_cpu_offload(device="cpu"), order)


@composes()
def test_sequential_offload(name, order):
    def technique(pipe):
        accelerate.cpu_offload(pipe.transformer, CPU, offload_buffers=True)

    return check_exact(name, technique, order)


GROUPS = {"leaf": {"offload_type": "leaf_level"}, "block": {"offload_type": "block_level", "num_blocks_per_group": 1}}


@composes()
def test_group_offload_of_leaves(name, order):
    return check_exact(name, functools.partial(_offload_groups, kind="leaf"), order)


@composes()
def test_group_offload_of_blocks(name, order):
    return check_exact(name, functools.partial(_offload_groups, kind="block"), order)


def _offload_groups(pipe: Any, kind: str) -> None:
    if torch.accelerator.current_accelerator() is None and Version(diffusers.__version__) < Version("0.41"):
        pytest.skip(f"group offload of diffusers {diffusers.__version__} asks for an accelerator, even from CPU to CPU")
    pipe.transformer.enable_group_offload(onload_device=CPU, offload_device=CPU, **GROUPS[kind])
