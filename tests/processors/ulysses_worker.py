"""One of the processes of test_ulysses.py: `torchrun --nproc_per_node=2 tests/processors/ulysses_worker.py FOLDER`.

Runs a small Wan alone and over all processes, and writes what it got to FOLDER/rank<r>.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import ContextParallelConfig
from diffusers.hooks import apply_context_parallel, context_parallel
from diffusers.models._modeling_parallel import ParallelConfig
from tiny import CASES, TINY_PRESET
from torch.distributed.device_mesh import init_device_mesh

from psa_diffusers.pipelines.enable import disable_psa, enable_psa
from psa_diffusers.pipelines.report import psa_report

CASE = CASES["wan2.1"]
SPARSE = {**TINY_PRESET, "warmup_steps": 1}
ONE = {**TINY_PRESET, "mask_ratios": {1: [0, 1]}}
BY_MASS = {
    **TINY_PRESET,
    "mask_mode": "thresholdbound",
    "mask_ratios": {1: [0, 0.3], 2: [0.3, 0.4], 8: [0.4, 0.5], 0: [0.5, 1]},
    "importance": "sampled_max",
}
ODD = (3, 5, 7)  # 105 tokens


def build(**kwargs: Any) -> Any:
    return CASE.build(**{"heads": 4, **kwargs})


def uneven() -> Any:
    """A Wan whose first heads look everywhere and whose last heads look at one place: dense and sparse by mass."""
    pipe = build(heads=8)
    for block in pipe.transformer.blocks:
        attention = block.attn1
        for norm in (attention.norm_q, attention.norm_k):
            by_head = torch.linspace(0.05, 3.0, 8).repeat_interleave(norm.weight.numel() // 8)
            norm.weight.data.copy_(by_head)
    return pipe


def gather_uneven(tensor: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
    """What diffusers does at the end of a forward for tokens that do not divide: gloo, unlike NCCL, cannot."""
    size = torch.distributed.get_world_size(group)
    lengths = context_parallel.gather_size_by_comm(tensor.shape[dim], group)
    padded = tensor.new_zeros([max(lengths) if axis == dim else n for axis, n in enumerate(tensor.shape)])
    padded.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    parts = [torch.empty_like(padded) for _ in range(size)]
    torch.distributed.all_gather(parts, padded, group=group)
    return torch.cat([part.narrow(dim, 0, n) for part, n in zip(parts, lengths, strict=True)], dim=dim)


def parallelise(pipe: Any, ring: bool = False, **kwargs: Any) -> Any:
    """What `transformer.enable_parallelism` does, which needs accelerators."""
    size = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (size, 1) if ring else (1, size), mesh_dim_names=("ring", "ulysses"))
    degrees = {"ring_degree": size} if ring else {"ulysses_degree": size}
    config = ContextParallelConfig(**degrees, mesh=mesh, **kwargs)
    parallel = ParallelConfig(context_parallel_config=config)
    parallel.setup(torch.distributed.get_rank(), size, torch.device("cpu"), mesh=mesh)
    for module in pipe.transformer.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = parallel
    apply_context_parallel(pipe.transformer, config, pipe.transformer._cp_plan)
    return pipe


def run(pipe: Any, **kwargs: Any) -> dict[str, Any]:
    video = CASE.run(pipe, **kwargs)
    return {"video": video, "records": psa_report(pipe).records}


def both_ways(make: Any, preset: dict[str, Any], order: str, grid: Any = None, **kwargs: Any) -> dict[str, Any]:
    """The same alone, and over the processes."""
    alone = make()
    enable_psa(alone, report=True, **preset)
    found = {"alone": run(alone, grid=grid)}
    pipe = make()
    if order == "parallel-first":
        parallelise(pipe, **kwargs)
    enable_psa(pipe, report=True, **preset)
    if order == "psa-first":
        parallelise(pipe, **kwargs)
    found["together"] = run(pipe, grid=grid)
    found["again"] = run(pipe, grid=grid)
    found["orders"] = [block.attn1.processor.dealer.order for block in pipe.transformer.blocks]
    disable_psa(pipe)
    found["dense together"] = CASE.run(pipe, grid=grid)
    disable_psa(alone)
    found["dense alone"] = CASE.run(alone, grid=grid)
    return found


def message_of(call: Any) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    context_parallel._all_gather_anything = gather_uneven
    with torch.no_grad():
        found = {
            "psa-first": both_ways(build, SPARSE, "psa-first"),
            "parallel-first": both_ways(build, SPARSE, "parallel-first"),
            "factor-one": both_ways(build, ONE, "psa-first"),
            "odd": both_ways(build, SPARSE, "psa-first", grid=ODD, ulysses_anything=True),
            "odd-heads": both_ways(lambda: build(heads=3), SPARSE, "psa-first", ulysses_anything=True),
            "uneven": both_ways(uneven, BY_MASS, "psa-first"),
            "kept": both_ways(build, {**SPARSE, "refresh_every": 2}, "psa-first"),
            "kept, uneven": both_ways(uneven, {**BY_MASS, "refresh_every": 2}, "psa-first"),
        }
        ring = parallelise(build(), ring=True)
        found["ring, enabling"] = message_of(lambda: enable_psa(ring, **SPARSE))
        ring = enable_psa(build(), **SPARSE)
        parallelise(ring, ring=True)
        found["ring, calling"] = message_of(lambda: CASE.run(ring))
        # a plan of the user's own may split anything: dense, and the report says so
        own = build()
        type(own.transformer)._cp_plan, plan = None, type(own.transformer)._cp_plan
        enable_psa(own, report=True, **SPARSE)
        type(own.transformer)._cp_plan = plan
        found["own plan"] = run(parallelise(own))
    torch.save(found, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))
