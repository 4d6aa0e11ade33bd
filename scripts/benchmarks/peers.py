"""Other attentions to time beside ours: dense ones of torch, FlexAttention, and two repositories, given a checkout.

Each maker takes q, k, v ``[B, H, L, D]`` and a density and returns a call that does the whole operation, planning
included, or raises with the reason why it cannot run here.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

OFFICIAL_RATIOS = {1: (0.0, 0.1), 2: (0.1, 0.15), 4: (0.15, 0.15), 8: (0.15, 0.35), 0: (0.35, 1.0)}
_compiled_flex = None


def dense(q, k, v, backend):
    """Dense attention of torch: ``cudnn`` or ``flash``."""
    chosen = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[backend]

    def call():
        with sdpa_kernel([chosen]):
            return F.scaled_dot_product_attention(q, k, v)

    return call


def flex(q, k, v, density, importance, order):
    """Compiled FlexAttention over the most important blocks of 128, as whole blocks, on tokens in our order.

    Putting the tokens in order, and back, is not timed, though ours does it. Where text begins in the middle of a block
    of 128, our estimate for it is of a block that begins there.

    Args:
        q, k, v: Inputs.
        density: Share of the key blocks that a query block reads.
        importance: Call that estimates ``[B, H, M, N]``; part of what is timed, as ours is.
        order: ``[L]``, which token stands where.

    Returns:
        The call, whose result is in this order.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    global _compiled_flex
    if _compiled_flex is None:
        _compiled_flex = torch.compile(flex_attention, dynamic=False)
    tokens, blocks = q.shape[2], -(-q.shape[2] // 128)
    kept = max(1, round(density * blocks))
    q, k, v = (x[:, :, order].contiguous() for x in (q, k, v))

    def call():
        index = importance()[:, :, :blocks, :blocks].topk(kept, dim=-1).indices.sort(-1).values.int()
        index = F.pad(index, (0, blocks - kept))
        number = torch.full(index.shape[:3], kept, dtype=torch.int32, device=q.device)
        mask = BlockMask.from_kv_blocks(
            torch.zeros_like(number), torch.zeros_like(index), number, index, BLOCK_SIZE=(128, 128),
            mask_mod=lambda b, h, i, j: i >= 0, seq_lengths=(tokens, tokens),
        )  # fmt: skip
        return _compiled_flex(q, k, v, block_mask=mask)

    return call


def package_of(folder: Path, name: str) -> ModuleType:
    """Import a package that stands in a folder, without letting anything else be found there.

    Raises:
        ModuleNotFoundError: If the folder holds no such package.
    """
    if name in sys.modules:
        return sys.modules[name]
    spec = PathFinder.find_spec(name, [str(folder)])
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"no package {name} in {folder}")
    sys.modules[name] = module_from_spec(spec)  # first: its own modules import it
    try:
        spec.loader.exec_module(sys.modules[name])
    except BaseException:
        del sys.modules[name]
        raise
    return sys.modules[name]


def official_psa(q, k, v, checkout):
    """The official PSA plug-in with the published shares and blocks of 128; tokens as they stand, no reordering."""
    psa_triton = package_of(Path(checkout) / "src", "psa_triton")
    module = psa_triton.PSAAttention(
        psa_triton.PSAConfig(block_m=128, block_n=128, tile_n=32, mask_ratios=OFFICIAL_RATIOS, mask_mode="topk")
    )
    return lambda: module(q, k, v)


def pisa(q, k, v, density, checkout):
    """PISA: top blocks of 64, and the mean and first order of the others."""
    import triton

    piecewise_sparse_attention = package_of(checkout, "piecewise_attn").piecewise_sparse_attention
    # its kernel makes tensor descriptors on the device, which need room
    triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    q, k, v = (x.contiguous() for x in (q, k, v))
    return lambda: piecewise_sparse_attention(q, k, v, density=density, block_size=64)
