"""PSA and caches, which skip work."""

from __future__ import annotations

import logging
from typing import Any

import diffusers
import pytest
import torch
from cells import BIT, alone, both_on, build, calls, check_cache, composes, run
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig

from psa_diffusers.pipelines.enable import disable_psa

pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")  # FasterCache


def _config(name: str, **kwargs: Any) -> Any:
    """A cache configuration that this diffusers may not have."""
    kind = getattr(diffusers, name, None)
    if kind is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return kind(**kwargs)


@composes()
def test_first_block_cache(name, order):
    def on(threshold):
        return lambda pipe: pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))

    return check_cache(name, order, on(0.0), on(0.5))


@composes()
def test_mag_cache(name, order):
    def on(threshold):
        shape = {"num_inference_steps": 4, "mag_ratios": [1.01] * 8, "retention_ratio": 0.2, "max_skip_steps": 2}
        return lambda pipe: pipe.transformer.enable_cache(_config("MagCacheConfig", threshold=threshold, **shape))

    return check_cache(name, order, on(0.0), on(0.5))


@composes()
def test_pyramid_attention_broadcast(name, order):
    def on(skip_range):
        def technique(pipe):
            config = PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=skip_range,
                spatial_attention_timestep_skip_range=(-1, 1001),
                spatial_attention_block_identifiers=("blocks",),
                current_timestep_callback=lambda: pipe.current_timestep,
            )
            pipe.transformer.enable_cache(config)

        return technique

    return check_cache(name, order, on(1), on(2))


def _faster_cache(pipe: Any, timesteps: tuple[int, int], is_guidance_distilled: bool = False) -> None:
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=timesteps,
        spatial_attention_block_identifiers=("blocks",),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=timesteps,
        attention_weight_callback=lambda module: 0.5,
        tensor_format="BFCHW",
        is_guidance_distilled=is_guidance_distilled,
        current_timestep_callback=lambda: pipe.current_timestep,
    )
    pipe.transformer.enable_cache(config)


@composes()
def test_faster_cache(name, order):
    return check_cache(
        name, order, lambda pipe: _faster_cache(pipe, (2000, 3000)), lambda pipe: _faster_cache(pipe, (-1, 1001))
    )


@composes()
def test_faster_cache_without_a_batch_of_both_branches(name, order):
    pipe = build(name)
    both_on(pipe, lambda pipe: _faster_cache(pipe, (-1, 1001)), "sparse", order)
    run(pipe, name)


@composes()
def test_faster_cache_of_attention_alone(name, order):
    return check_cache(
        name,
        order,
        lambda pipe: _faster_cache(pipe, (2000, 3000), is_guidance_distilled=True),
        lambda pipe: _faster_cache(pipe, (-1, 990), is_guidance_distilled=True),
    )


@composes()
def test_taylor_seer(name, order):
    def on(interval):
        def technique(pipe):
            config = _config(
                "TaylorSeerCacheConfig",
                cache_interval=interval,
                disable_cache_before_step=1,
                max_order=1,
                cache_identifiers=[r".*blocks\.\d+\.attn1"],
            )
            pipe.transformer.enable_cache(config)

        return technique

    return check_cache(name, order, on(1), on(2))


def _cache_dit(pipe: Any, threshold: float) -> None:
    import cache_dit

    logging.getLogger("CACHE_DIT").setLevel(logging.ERROR)
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1, residual_diff_threshold=threshold
    )
    cache_dit.enable_cache(pipe, cache_config=config)


@composes(needs="cache_dit")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_cache_dit(name, order):
    import cache_dit

    return check_cache(
        name, order, lambda pipe: _cache_dit(pipe, 0.0), lambda pipe: _cache_dit(pipe, 0.5), cache_dit.disable_cache
    )


@composes(needs="cache_dit")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_cache_dit_goes_first(name, order):
    import cache_dit

    pipe = build(name)
    cls, call = type(pipe), type(pipe).__call__
    both_on(pipe, lambda pipe: _cache_dit(pipe, 0.5), "sparse", order)
    run(pipe, name)
    cache_dit.disable_cache(pipe)
    assert torch.equal(run(pipe, name), alone(name, "sparse")[0])
    assert calls(pipe) == alone(name, "sparse")[1]
    disable_psa(pipe)
    assert torch.equal(run(pipe, name), alone(name, "dense")[0])
    assert isinstance(pipe, cls)
    assert cls.__call__ is call
    return BIT
