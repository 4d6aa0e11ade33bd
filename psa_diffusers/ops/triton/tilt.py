"""The gain of the value tilt: how far the tilt's first order is from what softmax does, on a sample of each head."""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_diffusers.ops.layout import Layout
from psa_diffusers.ops.triton import tuning
from psa_diffusers.ops.triton.launch import aside, cdiv, head_strides, load_rows, next_power_of_2, on_device, padded
from psa_diffusers.ops.types import GAIN_BLOCK_STRIDE, GAIN_QUERY_STRIDE, Pyramid

_SPLITS = 8  # programs a head; a number of the chip's own would change the order of the sums
_QUERIES = 16  # a program: the matrix units' smallest tile, as there are few


def fit_tilt(pyramid: Pyramid, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Pyramid:
    """Scale the covariances of each head by the gain that fits a sample. As in `ops.reference`."""
    batch, heads, _, dim = q.shape
    block_n, size = layout.block_n, padded(dim)
    num_queries = cdiv(layout.video_query_blocks * layout.block_m, GAIN_QUERY_STRIDE)
    num_blocks = cdiv(layout.video_key_blocks, GAIN_BLOCK_STRIDE)
    tiles, columns = cdiv(num_queries, _QUERIES), min(size, 64, 2**13 // size)
    # float32 at full precision has no matrix unit on most chips: small tiles, more warps
    wide = q.element_size() == 4
    tile = max(16, min(block_n, (2**11 if wide else 2**13) // size))
    # a second block in flight takes 64 KiB at the most, which AMD's chips have not
    alone = wide or block_n * size > 2**14 or tuning.matrix_unit(q.device) == "mfma"
    with aside(k) as done, on_device(k):
        parts = torch.empty(_SPLITS, batch * heads, dim, dim, dtype=torch.float32, device=k.device)
        sums = torch.empty(batch * heads, tiles, 2, dtype=torch.float32, device=k.device)
        covariance = torch.empty_like(pyramid.covariance)
        _sample_kernel[(_SPLITS * cdiv(dim, columns), batch * heads)](
            k, v, layout.key_rows, parts, head_strides(k), head_strides(v), heads, num_blocks,
            HEAD_DIM=dim, D_PAD=size, COLUMNS=columns, BLOCK_N=block_n, TILE=tile, STRIDE=GAIN_BLOCK_STRIDE,
            SPLITS=_SPLITS, num_warps=8 if size >= 128 else 4, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
        _agreement_kernel[(tiles, batch * heads)](
            q, k, v, layout.query_rows, layout.key_rows, parts, sums,
            head_strides(q), head_strides(k), head_strides(v), heads, num_queries, num_blocks, scale,
            HEAD_DIM=dim, D_PAD=size, QUERIES=_QUERIES, CHANNELS=min(size, 32), BLOCK_N=block_n, TILE=tile,
            QUERY_STRIDE=GAIN_QUERY_STRIDE, STRIDE=GAIN_BLOCK_STRIDE, SPLITS=_SPLITS,
            num_warps=8 if wide or size > 128 else 4, num_stages=1 if alone else 2,
            enable_fp_fusion=True,
        )  # fmt: skip
        numbers = covariance[0, 0].numel()
        _scale_kernel[(cdiv(numbers, 4096), batch * heads)](
            pyramid.covariance, sums, covariance, numbers, tiles,
            TILES=next_power_of_2(tiles), SIZE=4096, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return replace(pyramid, covariance=covariance, ready=done[0] if done else None)


@triton.jit(do_not_specialize=["num_blocks"])
def _sample_kernel(
    k_ptr, v_ptr, rows_ptr, parts_ptr,  # [B, H, L, D] [B, H, L, D] [N * BLOCK_N] [SPLITS, B * H, D, D]
    K_STRIDES, V_STRIDES, H, num_blocks,
    HEAD_DIM: tl.constexpr, D_PAD: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr,
    TILE: tl.constexpr, STRIDE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Covariance of keys and values within every STRIDE-th block, summed. Grid: (SPLITS * panels of COLUMNS, B * H)."""
    split = tl.program_id(0) % SPLITS
    i_bh = tl.program_id(1).to(tl.int64)
    k_ptr += (i_bh // H) * K_STRIDES[0] + (i_bh % H) * K_STRIDES[1]
    v_ptr += (i_bh // H) * V_STRIDES[0] + (i_bh % H) * V_STRIDES[1]
    o_d = tl.arange(0, D_PAD)
    o_c = tl.program_id(0) // SPLITS * COLUMNS + tl.arange(0, COLUMNS)
    o_t = tl.arange(0, TILE)
    total = tl.zeros([D_PAD, COLUMNS], tl.float32)
    for i in range(0, tl.cdiv(num_blocks, SPLITS)):
        lane = (i * SPLITS + split) * STRIDE * BLOCK_N + o_t
        stop = num_blocks * STRIDE * BLOCK_N
        count = 0.0
        mean_k = tl.zeros([D_PAD], tl.float32)
        mean_v = tl.zeros([COLUMNS], tl.float32)
        for t in tl.static_range(0, BLOCK_N, TILE):
            rows = tl.load(rows_ptr + lane + t, mask=lane < stop, other=-1)
            count += tl.sum((rows >= 0).to(tl.float32), 0)
            mean_k += tl.sum(load_rows(k_ptr, rows, rows >= 0, K_STRIDES[2], o_d, HEAD_DIM, D_PAD).to(tl.float32), 0)
            mean_v += tl.sum(load_rows(v_ptr, rows, rows >= 0, V_STRIDES[2], o_c, HEAD_DIM, COLUMNS).to(tl.float32), 0)
        mean_k /= tl.maximum(count, 1.0)
        mean_v /= tl.maximum(count, 1.0)
        for t in tl.static_range(0, BLOCK_N, TILE):
            rows = tl.load(rows_ptr + lane + t, mask=lane < stop, other=-1)
            b_k = load_rows(k_ptr, rows, rows >= 0, K_STRIDES[2], o_d, HEAD_DIM, D_PAD)
            b_v = load_rows(v_ptr, rows, rows >= 0, V_STRIDES[2], o_c, HEAD_DIM, COLUMNS)
            away_k = tl.where((rows >= 0)[:, None], b_k.to(tl.float32) - mean_k[None, :], 0.0).to(b_k.dtype)
            away_v = tl.where((rows >= 0)[:, None], b_v.to(tl.float32) - mean_v[None, :], 0.0).to(b_v.dtype)
            total = tl.dot(tl.trans(away_k), away_v, total, input_precision="ieee")
    i_part = split.to(tl.int64) * tl.num_programs(1) + i_bh
    tl.store(
        parts_ptr + i_part * HEAD_DIM * HEAD_DIM + o_d[:, None] * HEAD_DIM + o_c[None, :],
        total,
        mask=(o_d < HEAD_DIM)[:, None] & (o_c < HEAD_DIM)[None, :],
    )


@triton.jit(do_not_specialize=["num_queries", "num_blocks"])
def _agreement_kernel(
    q_ptr, k_ptr, v_ptr, query_rows_ptr, key_rows_ptr,  # [B, H, L, D] three times, [M * block_m] [N * BLOCK_N]
    parts_ptr, sums_ptr,                                # [SPLITS, B * H, D, D] [B * H, tiles, 2]
    Q_STRIDES, K_STRIDES, V_STRIDES, H, num_queries, num_blocks, scale,
    HEAD_DIM: tl.constexpr, D_PAD: tl.constexpr, QUERIES: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr,
    TILE: tl.constexpr, QUERY_STRIDE: tl.constexpr, STRIDE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """How far values shift along what the tilt expects, and how much it expects, of QUERIES queries and all blocks.

    Grid: (cdiv(num_queries, QUERIES), B * H).
    """
    i_bh = tl.program_id(1).to(tl.int64)
    q_ptr += (i_bh // H) * Q_STRIDES[0] + (i_bh % H) * Q_STRIDES[1]
    k_ptr += (i_bh // H) * K_STRIDES[0] + (i_bh % H) * K_STRIDES[1]
    v_ptr += (i_bh // H) * V_STRIDES[0] + (i_bh % H) * V_STRIDES[1]
    o_d = tl.arange(0, D_PAD)
    o_t = tl.arange(0, TILE)
    o_q = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    query_rows = tl.load(query_rows_ptr + o_q * QUERY_STRIDE, mask=o_q < num_queries, other=-1)
    b_q = load_rows(q_ptr, query_rows, query_rows >= 0, Q_STRIDES[2], o_d, HEAD_DIM, D_PAD)

    # the sample's number of tokens: all blocks but the last of the video are full
    last = tl.load(key_rows_ptr + (num_blocks - 1) * STRIDE * BLOCK_N + tl.arange(0, BLOCK_N))
    tokens = ((num_blocks - 1) * BLOCK_N + tl.sum((last >= 0).to(tl.int32), 0)).to(tl.float32)
    expected = tl.zeros([QUERIES, D_PAD], tl.float32)
    # CHANNELS rows of the matrix at a time fit any chip, if none are fetched ahead
    for channel in tl.range(0, HEAD_DIM, CHANNELS, num_stages=1):
        o_k = channel + tl.arange(0, CHANNELS)
        part = load_rows(q_ptr, query_rows, query_rows >= 0, Q_STRIDES[2], o_k, HEAD_DIM, CHANNELS).to(tl.float32)
        covariance = tl.zeros([CHANNELS, D_PAD], tl.float32)
        for split in tl.static_range(SPLITS):
            matrix = parts_ptr + (split * tl.num_programs(1) + i_bh) * HEAD_DIM * HEAD_DIM
            covariance += load_rows(matrix, o_k, o_k < HEAD_DIM, HEAD_DIM, o_d, HEAD_DIM, D_PAD)
        expected = tl.dot(part, covariance, expected, input_precision="ieee")
    expected *= scale / tokens
    size = tl.sum(expected * expected, 1)
    # of length 1, so that half precision holds it
    length = tl.sqrt(size)
    along_q = (expected / tl.maximum(length, 1e-30)[:, None]).to(q_ptr.dtype.element_ty)

    agreement = tl.zeros([QUERIES], tl.float32)
    expectation = tl.zeros([QUERIES], tl.float32)
    for block in range(0, num_blocks):
        largest = tl.full([QUERIES], -1e38, tl.float32)
        mass = tl.zeros([QUERIES], tl.float32)
        weighted = tl.zeros([QUERIES], tl.float32)
        plain = tl.zeros([QUERIES], tl.float32)
        count = 0.0
        for t in tl.static_range(0, BLOCK_N, TILE):
            rows = tl.load(key_rows_ptr + block * STRIDE * BLOCK_N + t + o_t)
            b_k = load_rows(k_ptr, rows, rows >= 0, K_STRIDES[2], o_d, HEAD_DIM, D_PAD)
            b_v = load_rows(v_ptr, rows, rows >= 0, V_STRIDES[2], o_d, HEAD_DIM, D_PAD)
            scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
            scores = tl.where((rows >= 0)[None, :], scores, float("-inf"))
            along = tl.dot(along_q, tl.trans(b_v), input_precision="ieee")  # 0 where there is no token
            new_largest = tl.maximum(largest, tl.max(scores, 1))
            weights = tl.exp(scores - new_largest[:, None])
            kept = tl.exp(largest - new_largest)
            mass = mass * kept + tl.sum(weights, 1)
            weighted = weighted * kept + tl.sum(weights * along, 1)
            plain += tl.sum(along, 1)
            count += tl.sum((rows >= 0).to(tl.float32), 0)
            largest = new_largest
        pair = length * (weighted / mass - plain / count)
        finite = (tl.abs(pair) < float("inf")) & (size < float("inf"))
        agreement += tl.where(finite, pair, 0.0)
        expectation += tl.where(finite, size, 0.0)
    sums_ptr += (i_bh * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(sums_ptr, tl.sum(agreement, 0))
    tl.store(sums_ptr + 1, tl.sum(expectation, 0))


@triton.jit(do_not_specialize=["numbers", "num_tiles"])
def _scale_kernel(
    in_ptr, sums_ptr, out_ptr,  # [B * H, numbers] [B * H, tiles, 2] [B * H, numbers]
    numbers, num_tiles, TILES: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The covariances of a head times its gain. Grid: (cdiv(numbers, SIZE), B * H)."""
    i_bh = tl.program_id(1).to(tl.int64)
    o_t = tl.arange(0, TILES)
    sums_ptr += (i_bh * num_tiles + o_t) * 2
    agreement = tl.sum(tl.load(sums_ptr, mask=o_t < num_tiles, other=0.0), 0)
    expectation = tl.sum(tl.load(sums_ptr + 1, mask=o_t < num_tiles, other=0.0), 0)
    gain = tl.minimum(tl.maximum(agreement / tl.maximum(expectation, 1.1754943508222875e-38), 0.0), 1.0)
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    covariance = tl.load(in_ptr + i_bh * numbers + place, mask=place < numbers)
    tl.store(out_ptr + i_bh * numbers + place, covariance * gain, mask=place < numbers)
