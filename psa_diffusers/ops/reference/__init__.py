"""The five stages in plain torch: the readable form, and the path that runs where Triton does not."""

from psa_diffusers.ops.reference.attend import attend
from psa_diffusers.ops.reference.importance import block_importance
from psa_diffusers.ops.reference.levels import assign_block_levels, key_cosine_cap
from psa_diffusers.ops.reference.moments import fit_tilt, moment_importance, tilt_gain
from psa_diffusers.ops.reference.pyramid import build_pyramid
from psa_diffusers.ops.reference.schedule import make_schedule, plan_blocks

__all__ = [
    "assign_block_levels",
    "attend",
    "block_importance",
    "build_pyramid",
    "fit_tilt",
    "key_cosine_cap",
    "make_schedule",
    "moment_importance",
    "plan_blocks",
    "tilt_gain",
]
