"""A family from outside the package: the example of docs/developer/adding_a_model.md, on a denoiser written here."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from tiny import TINY_PRESET, seeded
from torch import nn

import psa_diffusers
from psa_diffusers import disable_psa, enable_psa, psa_report
from psa_diffusers.models import registry

PAGE = Path(__file__).parents[2] / "docs" / "developer" / "adding_a_model.md"
GRID = (3, 5, 7)

pytestmark = pytest.mark.usefixtures("no_gradients")


class DenseProcessor:
    def __call__(self, attn, hidden_states, attention_mask=None):
        projections = (attn.to_q, attn.to_k, attn.to_v)
        q, k, v = (to(hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2) for to in projections)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        return attn.to_out(out.transpose(1, 2).flatten(2))


class SelfAttention(nn.Module):
    def __init__(self, heads, head_dim):
        super().__init__()
        self.heads, self.inner_dim = heads, heads * head_dim
        for name in ("to_q", "to_k", "to_v", "to_out"):
            setattr(self, name, nn.Linear(self.inner_dim, self.inner_dim))
        self.processor = DenseProcessor()

    def forward(self, hidden_states, attention_mask=None):
        return self.processor(self, hidden_states, attention_mask)


class VideoTransformer(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, num_attention_heads=2, attention_head_dim=16, num_layers=2):
        super().__init__()
        width = num_attention_heads * attention_head_dim
        self.embed = nn.Conv3d(4, width, (1, 2, 2), stride=(1, 2, 2))
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attn": SelfAttention(num_attention_heads, attention_head_dim)}) for _ in range(num_layers)
        )
        self.out = nn.ConvTranspose3d(width, 4, (1, 2, 2), stride=(1, 2, 2))

    def forward(self, hidden_states, timestep):
        patches = self.embed(hidden_states) * (1 + timestep / 1000)
        tokens = patches.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = tokens + block["attn"](tokens)
        return self.out(tokens.transpose(1, 2).unflatten(2, patches.shape[2:]))


class VideoPipeline(DiffusionPipeline):
    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def __call__(self, steps, batch=1):
        frames, height, width = GRID
        shape = (batch, 4, frames, 2 * height, 2 * width)
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self.scheduler.set_timesteps(steps)
        for timestep in self.scheduler.timesteps:
            latents = self.scheduler.step(self.transformer(latents, timestep), timestep, latents).prev_sample
        return latents


@pytest.fixture
def example(monkeypatch):
    """What the example in the docs defines; its family is forgotten after the test."""
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    names = {}
    exec(compile(code, PAGE.name, "exec"), names)
    return SimpleNamespace(**names)


def build():
    pipe = VideoPipeline(seeded(VideoTransformer), FlowMatchEulerDiscreteScheduler())
    return pipe


@pytest.mark.usefixtures("example")
def test_everything_comes_back_to_the_bit():
    pipe = build()
    dense, found = pipe(3), [block["attn"].processor for block in pipe.transformer.blocks]
    sparse = enable_psa(pipe, **TINY_PRESET)(3)
    assert not torch.equal(sparse, dense)
    disable_psa(pipe)
    assert [block["attn"].processor for block in pipe.transformer.blocks] == found
    assert torch.equal(pipe(3), dense)


@pytest.mark.usefixtures("example")
def test_all_factors_one_is_dense():
    pipe = build()
    dense = pipe(3, batch=2)
    enable_psa(pipe, **{**TINY_PRESET, "mask_ratios": {1: [0, 1]}})
    torch.testing.assert_close(pipe(3, batch=2), dense)


@pytest.mark.usefixtures("example")
def test_the_timestep_drives_the_clock_and_the_report_is_complete():
    pipe = enable_psa(build(), report=True, **{**TINY_PRESET, "warmup_steps": 1})
    for steps in (4, 3):
        pipe(steps)
        records = psa_report(pipe).records
        assert [(record["step"], record["layer"], record["kind"]) for record in records] == [
            (step, f"blocks.{layer}.attn", "sparse" if step else "dense") for step in range(steps) for layer in range(2)
        ]
        assert {record["grid"] for record in records} == {GRID}
    assert "section default" in psa_report(pipe).title


@pytest.mark.usefixtures("example")
def test_presets_of_a_section_of_its_own(tmp_path, monkeypatch, example):
    path = tmp_path / "mine.yaml"
    path.write_text("MyModel:\n  attention_configs:\n    careful:\n      type: psa\n      warmup_steps: 7\n")
    monkeypatch.setattr(registry, "_FAMILIES", {})
    family = psa_diffusers.Family(
        name="VideoTransformer",
        denoisers=("VideoTransformer",),
        attentions=r"blocks\.\d+\.attn",
        read_grid=example.read_grid,
        processor=example.VideoPSAProcessor,
        make_default=lambda config, path, attention: DenseProcessor(),
        sections=(psa_diffusers.SectionRule("MyModel", heads=2, layers=2),),
    )
    assert psa_diffusers.register_family(family) is family
    pipe = enable_psa(build(), config=path, report=True)
    assert psa_report(pipe).title == "PSA preset 'careful' of section MyModel"


def test_before_it_is_registered_it_is_refused():
    with pytest.raises(TypeError, match=r"VideoTransformer.*docs/developer/adding_a_model.md"):
        enable_psa(build())


def test_a_class_that_is_taken_is_refused_and_nothing_is_registered(example):
    before = dict(registry._FAMILIES)
    family = psa_diffusers.Family(
        name="Mine",
        denoisers=("New", "VideoTransformer"),
        attentions="x",
        read_grid=example.read_grid,
        processor=example.VideoPSAProcessor,
    )
    with pytest.raises(ValueError, match="VideoTransformer already belongs to the family 'VideoTransformer'"):
        psa_diffusers.register_family(family)
    assert before == registry._FAMILIES


class CallingProcessor(psa_diffusers.FamilyProcessor):
    """With a call of its own, in place of what the base does."""

    def __call__(self, attn, hidden_states, attention_mask=None):
        reason = self.why_dense(attn, hidden_states, attention_mask)
        if reason:
            return self.dense(reason, hidden_states.shape[1], attn, hidden_states, attention_mask)
        projections = (attn.to_q, attn.to_k, attn.to_v)
        q, k, v = (to(hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2) for to in projections)
        return attn.to_out(self.sparse(q, k, v).transpose(1, 2).flatten(2))


def test_a_family_may_bring_a_call_of_its_own(example):
    by_arguments = enable_psa(build(), report=True, **{**TINY_PRESET, "warmup_steps": 1})
    expected, records = by_arguments(3), psa_report(by_arguments).records
    family = registry.family_of(by_arguments.transformer)
    registry._FAMILIES.clear()
    psa_diffusers.register_family(dataclasses.replace(family, processor=CallingProcessor))
    pipe = enable_psa(build(), report=True, **{**TINY_PRESET, "warmup_steps": 1})
    assert torch.equal(pipe(3), expected)
    assert psa_report(pipe).records == records
