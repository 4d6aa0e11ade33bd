"""The backend "triton": the stages as Triton kernels, file by file under the names of `ops.reference`.

What comes in and goes out is the same, but for views with contiguous channels, no float64 and no gradients; `attend`
hands what `attend_hopper` takes to it. `launch` has what every launcher needs, `tuning` the table of launches by chip.
Triton is imported only here, so the package works where it is missing.
"""

from psa_diffusers.ops.triton.attend import attend
from psa_diffusers.ops.triton.importance import block_importance
from psa_diffusers.ops.triton.levels import assign_block_levels, key_cosine_cap
from psa_diffusers.ops.triton.pyramid import build_pyramid
from psa_diffusers.ops.triton.schedule import make_schedule, plan_blocks
from psa_diffusers.ops.triton.tilt import fit_tilt

__all__ = [
    "assign_block_levels", "attend", "block_importance", "build_pyramid", "fit_tilt", "key_cosine_cap",
    "make_schedule", "plan_blocks",
]  # fmt: skip
