"""PSA on copies: of pipelines, denoisers and presets, in memory and on disk."""

from __future__ import annotations

import copy
import pickle

import torch
from cells import BIT, SPARSE, alone, build, calls, composes, run, switch_on

from psa_diffusers.pipelines.enable import disable_psa, enable_psa
from psa_diffusers.presets import list_presets, load_preset
from psa_diffusers.processors.standalone import PSAProcessor


@composes(orders=())
def test_from_pipe(name):
    pipe = build(name)
    cls = type(pipe)
    switch_on(pipe, "sparse")
    other = cls.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(run(other, name), alone(name, "sparse")[0])
    assert torch.equal(run(pipe, name), alone(name, "sparse")[0])
    disable_psa(pipe)
    assert torch.equal(run(other, name), alone(name, "dense")[0])
    return BIT


@composes(orders=())
def test_shared_denoiser(name):
    pipe = build(name)
    other = type(pipe)(**pipe.components)
    switch_on(pipe, "sparse")
    before = {attention.processor for attention in pipe.transformer.modules() if hasattr(attention, "processor")}
    try:
        switch_on(other, "one")
    finally:
        after = {attention.processor for attention in pipe.transformer.modules() if hasattr(attention, "processor")}
        assert after == before
        assert torch.equal(run(pipe, name), alone(name, "sparse")[0])


@composes(orders=())
def test_saved_and_loaded(name, tmp_path):
    pipe = build(name)
    cls = type(pipe)
    pipe.save_pretrained(tmp_path / "off")
    switch_on(pipe, "sparse")
    pipe.save_pretrained(tmp_path / "on")
    files = sorted(path.relative_to(tmp_path / "off") for path in (tmp_path / "off").rglob("*") if path.is_file())
    for path in files:
        assert (tmp_path / "on" / path).read_bytes() == (tmp_path / "off" / path).read_bytes()
    assert len(list((tmp_path / "on").rglob("*"))) == len(list((tmp_path / "off").rglob("*")))
    loaded = cls.from_pretrained(tmp_path / "on")
    assert type(loaded) is cls
    loaded.set_progress_bar_config(disable=True)
    state, expected = loaded.transformer.state_dict(), pipe.transformer.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    switch_on(loaded, "sparse")
    run(loaded, name)
    assert calls(loaded) == alone(name, "sparse")[1]
    return BIT


@composes(orders=())
def test_deep_copy(name):
    pipe = build(name)
    switch_on(pipe, "sparse")
    other = copy.deepcopy(pipe)
    assert torch.equal(run(other, name), alone(name, "sparse")[0])
    assert calls(other) == alone(name, "sparse")[1]
    assert calls(pipe) == [], "the copy has not run in the original"
    disable_psa(other)
    assert torch.equal(run(other, name), alone(name, "dense")[0])
    assert torch.equal(run(pipe, name), alone(name, "sparse")[0])
    disable_psa(pipe)
    assert type(pipe) is type(other)
    return BIT


@composes(orders=())
def test_deep_copy_of_a_denoiser(name):
    pipe = build(name)
    pipe.transformer.set_attn_processor(PSAProcessor(report=True, **SPARSE))
    assert torch.equal(run(pipe, name), alone(name, "sparse")[0])
    recorded = calls(pipe)
    other = build(name)
    other.transformer = copy.deepcopy(pipe.transformer)
    assert torch.equal(run(other, name, steps=4), alone(name, "sparse")[0])
    assert [call[0] for call in calls(other)] == [call[0] for call in recorded]
    assert torch.equal(run(pipe, name), alone(name, "sparse")[0])
    assert [call[0] for call in calls(pipe)] == [call[0] for call in recorded]
    return BIT


@composes(orders=())
def test_pickled_presets(name):
    count = 0
    for section, names in list_presets().items():
        for preset_name in names:
            preset = load_preset(section, preset_name)
            assert pickle.loads(pickle.dumps(preset)) == preset
            count += 1
    assert count > 20
    pipe = build(name)
    preset = pickle.loads(pickle.dumps(load_preset("default", **SPARSE)))
    enable_psa(pipe, preset)
    given = run(pipe, name)
    disable_psa(pipe)
    enable_psa(pipe, load_preset("default", **SPARSE))
    assert torch.equal(run(pipe, name), given)
    return BIT
