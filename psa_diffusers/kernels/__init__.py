"""The five stages as Triton kernels, named and called as in `psa_diffusers.stages`. Only here triton is imported."""

from psa_diffusers.kernels.attend import attend
from psa_diffusers.kernels.importance import block_importance
from psa_diffusers.kernels.levels import assign_block_levels, key_cosine_cap
from psa_diffusers.kernels.pyramid import build_pyramid
from psa_diffusers.kernels.schedule import make_schedule, plan_blocks
from psa_diffusers.kernels.tilt import fit_tilt

__all__ = [
    "assign_block_levels",
    "attend",
    "block_importance",
    "build_pyramid",
    "fit_tilt",
    "key_cosine_cap",
    "make_schedule",
    "plan_blocks",
]
