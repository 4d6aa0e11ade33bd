"""PSA and what changes the weights: how they are stored, LoRA, fused projections."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cells import check_exact, check_weights, composes, run
from lora_files import lora_file

from psa_diffusers.lora.load import load_psa_lora, unload_psa_lora

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")


@composes()
def test_layerwise_casting(name, order, monkeypatch):
    def technique(pipe):
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)

    return check_weights(name, technique, order, monkeypatch)


@composes(needs="torchao")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torchao(name, order, monkeypatch):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    return check_weights(name, lambda pipe: quantize_(pipe.transformer, Int8WeightOnlyConfig()), order, monkeypatch)


@composes(needs="bitsandbytes")
def test_bitsandbytes_int8(name, order, monkeypatch):
    from bitsandbytes.nn import Linear8bitLt

    make = functools.partial(Linear8bitLt, has_fp16_weights=False)
    return check_weights(name, lambda pipe: _replace_linears(pipe, make), order, monkeypatch)


@composes(needs="bitsandbytes")
def test_bitsandbytes_nf4(name, order, monkeypatch):
    from bitsandbytes.nn import Linear4bit

    make = functools.partial(Linear4bit, compute_dtype=torch.float32, quant_type="nf4")
    return check_weights(name, lambda pipe: _replace_linears(pipe, make), order, monkeypatch)


def _replace_linears(pipe: Any, make: Callable[..., torch.nn.Module]) -> None:
    for path, part in list(pipe.transformer.named_modules()):
        for child, layer in list(part.named_children()):
            if isinstance(layer, torch.nn.Linear) and "attn" in path:
                other = make(layer.in_features, layer.out_features, bias=layer.bias is not None)
                other.load_state_dict(layer.state_dict())
                setattr(part, child, other.to("cpu"))


@composes()
def test_lora(name, order, monkeypatch, tmp_path):
    path = lora_file(tmp_path, name)
    return check_weights(name, lambda pipe: load_psa_lora(pipe, path, scale=0.5), order, monkeypatch)


@composes()
def test_fused_lora(name, order, monkeypatch, tmp_path):
    path = lora_file(tmp_path, name)
    return check_weights(name, lambda pipe: load_psa_lora(pipe, path, scale=0.5, fuse=True), order, monkeypatch)


@composes()
def test_unloaded_lora(name, order, tmp_path):
    path = lora_file(tmp_path, name)
    return check_exact(name, lambda pipe: unload_psa_lora(load_psa_lora(pipe, path)), order)


@composes()
def test_fused_projections(name, order, monkeypatch):
    def technique(pipe):
        pipe.transformer.fuse_qkv_projections()
        if order == "after":
            run(pipe, name, steps=1)

    return check_weights(name, technique, order, monkeypatch)
