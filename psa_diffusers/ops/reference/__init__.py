"""The backend "torch": the stages in plain torch, on any device, in float64 too.

In come q, k, v as the model has them and a `Layout`; out comes what `ops.types.Backend` says. Every stage is written
to be read beside docs/developer/concept.md, and the Triton kernels are held to it; it also runs where Triton does not.
"""

from psa_diffusers.ops.reference.attend import attend
from psa_diffusers.ops.reference.importance import block_importance
from psa_diffusers.ops.reference.levels import assign_block_levels, key_cosine_cap
from psa_diffusers.ops.reference.pyramid import build_pyramid
from psa_diffusers.ops.reference.schedule import make_schedule, plan_blocks
from psa_diffusers.ops.reference.tilt import fit_tilt

__all__ = [
    "assign_block_levels", "attend", "block_importance", "build_pyramid", "fit_tilt", "key_cosine_cap",
    "make_schedule", "plan_blocks",
]  # fmt: skip
