"""Random calls of the operation, hostile ones among them, and the judge of what comes out.

Every call has four heads, each with numbers, a level map and broken tokens of its own, so an example is four cases.
"""

import math
import traceback
from dataclasses import dataclass
from pathlib import Path

import oracle
import torch
from hypothesis import strategies as st

import psa_diffusers

HEADS = ((1, 4), (2, 2), (4, 1))
PACKAGE = Path(psa_diffusers.__file__).parent
VIEWS = ("plain", "transposed", "inside", "every_other", "one_head")


@dataclass(frozen=True)
class Call:
    """Arguments of `pyramid_attention`, and whether a token that is read holds NaN."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    case: dict
    has_nan: bool


@st.composite
def calls(draw, dtypes=(torch.float32, torch.float64, torch.float16, torch.bfloat16), *, longest=28, least_block=1):
    """A call of any shape, stride, dtype, scale and term; broken numbers stand where no query reads them, or do not."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    batch, heads = draw(st.sampled_from(HEADS))
    tokens, dim = draw(st.integers(1, longest)), draw(st.sampled_from((16, 16, 24, 40)))
    block_m, block_n = (draw(st.sampled_from([b for b in (1, 2, 4, 8, 16, 32) if b >= least_block])) for _ in "mn")
    dtype, size = draw(st.sampled_from(dtypes)), draw(st.sampled_from((1, 1, 3, 0.01, 0)))
    q, k, v = (view(draw(st.sampled_from(VIEWS)), (batch, heads, tokens, dim), size, dtype, rng) for _ in "qkv")
    shape = (batch, heads, -(-tokens // block_m), -(-tokens // block_n))
    factors = torch.tensor(draw(st.lists(st.sampled_from([0, *powers(block_n)]), min_size=1, max_size=4)))
    level_map = factors[torch.randint(0, len(factors), shape, generator=rng)]
    level_map = level_map.to(draw(st.sampled_from((torch.int16, torch.int64, torch.uint8))))
    terms = draw(st.booleans()), draw(st.booleans())
    broken = draw(st.sampled_from(("nothing", "unread", "unread", "read")))
    if broken == "unread" and not terms[1]:  # a covariance is over all tokens, read or not
        columns = [0, *draw(st.lists(st.integers(0, shape[3] - 1), max_size=2))]
        level_map[..., columns[draw(st.integers(0, 1)) :]] = 0
        break_unread(k, v, level_map, block_n, draw)
    # of one key torch's dense attention, too, gives the value without a look at the score
    has_nan = broken == "read" and not any(terms) and tokens > 1
    if has_nan:
        for x in (k, v):
            x[:, :, draw(st.integers(0, tokens - 1)), draw(st.integers(0, dim - 1))] = torch.nan
    case = {"level_map": level_map, "block_m": block_m, "block_n": block_n}
    case |= {"scale": draw(st.sampled_from((None, None, 0.25, -0.3, 0.0, 1e-20)))}
    case |= {"key_variance": terms[0], "value_tilt": terms[1]}
    return Call(q, k, v, case, has_nan)


def powers(largest):
    return [1 << bit for bit in range(largest.bit_length())]


def view(kind, shape, size, dtype, rng):
    """Random numbers as a view of memory in which everything beside them is NaN."""
    batch, heads, tokens, dim = shape
    numbers = (size * torch.randn(shape, generator=rng, dtype=torch.float64)).to(dtype)
    if kind == "transposed":
        return numbers.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "one_head":
        numbers[:, 1:] = numbers[:, :1]
        return numbers
    if kind == "inside":
        room = numbers.new_full((batch, heads + 1, tokens + 2, dim + 8), torch.nan)[:, 1:, 1:-1, 8:]
    elif kind == "every_other":
        room = numbers.new_full((batch, 2 * heads, 2 * tokens, dim), torch.nan)[:, ::2, ::2]
    else:
        return numbers
    return room.copy_(numbers)


def break_unread(k, v, level_map, block_n, draw):
    """NaN, inf or the largest numbers in the tokens of key blocks that no query of the head reads."""
    values = (torch.nan, torch.inf, -torch.inf, torch.finfo(k.dtype).max, torch.finfo(k.dtype).min)
    for x in (k, v):
        unread = (level_map == 0).all(2).repeat_interleave(block_n, 2)[:, :, : x.shape[2]]
        x[unread] = draw(st.sampled_from(values))


def judge(out, call, **more):
    """Hold what came out against the oracle, head by head."""
    case = {**call.case, **more}
    truth = oracle.oracle_attention(call.q, call.k, call.v, **case)
    assert out.dtype == call.q.dtype
    assert out.shape == call.q.shape
    if call.has_nan:
        assert torch.equal(out.isnan(), truth.isnan()), "NaN comes out where it is read, and nowhere else"
        return
    bound = rounding_bound(call, truth, **case)
    error = (out.double() - truth).abs().amax((2, 3))
    assert torch.isfinite(truth).all(), "the oracle reads what the call does"
    assert (error <= bound).all(), f"errors {error.tolist()}, bounds {bound.tolist()}"


def rounding_bound(call, truth, *, level_map, block_m, block_n, scale, key_variance, value_tilt, **_):
    """The most that roundings may move the output of each head ``[B, H]``, whatever the order of the operations.

    With u the rounding of the dtype and w that of sums (float32, or float64): a score is off by at most

        d = S (5u + (D + 8) w)  +  B (u + 4w)  +  E

    S being the largest sum of |scale q k|: the pooled key, both factors, the product and its sum with the bias are
    rounded. B is the largest bias. E is what the key-variance term is off by: sums of D + m + n products, of numbers as
    large as the norms of q and k. Weights are then off by exp(2d) - 1 of themselves, and the sum of weighted values by
    as much of the largest value, with five roundings more of weights, values and result, and one of each sum.
    The value tilt is off by the same share, and by the sums in its covariance, of its own size.
    """
    q, k, v = (x.double().abs() for x in (call.q, call.k, call.v))
    dim, tokens = q.shape[2:][::-1]
    read = (level_map != 0).any(2).repeat_interleave(block_n, 2)[:, :, :tokens, None]
    if not value_tilt:
        k, v = (torch.where(read, x, 0) for x in (k, v))  # the order of tokens does not matter where all are read
    scale = abs(1 / math.sqrt(dim) if scale is None else scale)
    u = torch.finfo(call.q.dtype).eps
    w = u if call.q.dtype == torch.float64 else torch.finfo(torch.float32).eps
    largest_v, largest_k = (x.amax((2, 3)) for x in (v, k))
    score = scale * (q @ k.mT).amax((2, 3))
    off = score * (5 * u + (dim + 8) * w) + (math.log(block_n) + 4 * key_variance) * (u + 4 * w)
    if key_variance:
        norms = q.square().sum(3).amax(2) * k.square().sum(3).amax(2)
        off = off + 2 * w * (dim + block_m + block_n + 8) * (scale**2 * norms / dim + 4)
    share = torch.expm1(2 * off) + 5 * u + (tokens + 8) * w
    size = largest_v
    if value_tilt:
        size = size + 4 * scale * q.sum(3).amax(2) * largest_k * largest_v
        share = share + (2 * dim + tokens) * w + u
    return size * share + torch.finfo(call.q.dtype).tiny


def explained(error):
    """Whether an error is one of ours: a ValueError or TypeError that the package raised itself, and that says more."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return isinstance(error, (ValueError, TypeError)) and raised_in.is_relative_to(PACKAGE) and len(str(error)) > 30
