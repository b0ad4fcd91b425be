"""The Triton kernels of linear_topk; the design is in README.md.

A candidate is one integer, so that the larger of two is the earlier of the order: the upper half
holds the logit as an unsigned number of the same order (NaN above all), the lower half what is
left of 2^32 - 1 after the class, since the lower class comes first.
"""

import triton
import triton.language as tl

from mbm_kernels._core import triton_math
from mbm_kernels._core.triton_math import dot, load_tile

NO_CANDIDATE = tl.constexpr(-(2**63))


@triton.jit
def as_key(x, v):
    """float32 x of classes v as int64; NaN comes before +infinity, -0 and 0 are equal."""
    x = tl.where(x == 0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(x == x, order, 0x7FFFFFFF)
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - v).to(tl.int64)


@triton.jit
def class_of(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF)


@triton.jit
def logit_of(key):
    order = (key >> 32).to(tl.int32)
    bits = tl.where(order < 0, order ^ 0x7FFFFFFF, order)
    return bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=("R",))
def tiles(
    hidden,  # [R, H]
    weight,  # [V, H]
    bias,  # [V] or None
    keys,  # int64 [R, tiles, K]
    maxima,  # float32 [R, tiles]
    sums,  # float32 [R, tiles], of e^(logit - maximum)
    R, H, V, tile_count, hidden_r, hidden_h, weight_v, weight_h, bias_v,
    K: tl.constexpr, TF32: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Logits of BLOCK_R rows and BLOCK_V classes, and what is kept of them."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    tile = tl.program_id(1)
    v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    x = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    for h0 in range(0, H, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        a = load_tile(hidden, r, h, R, H, hidden_r, hidden_h)
        b = tl.load(
            weight + v.to(tl.int64)[None, :] * weight_v + h[:, None] * weight_h,
            (h < H)[:, None] & (v < V)[None, :],
            0.0,
        )
        x = dot(a, b, x, TF32)
    if bias is not None:
        x += tl.load(bias + v * bias_v, v < V, 0.0).to(tl.float32)[None, :]
    inside = (v < V)[None, :]
    x = tl.where(inside, x, -float("inf"))
    # max() passes over NaN; the sum does not.
    most = tl.maximum(tl.max(x, 1), triton_math.LOWEST)
    total = tl.sum(tl.exp(x - most[:, None]), 1)
    at = r.to(tl.int64) * tile_count + tile
    tl.store(maxima + at, most, r < R)
    tl.store(sums + at, total, r < R)
    key = tl.where(inside, as_key(x, v[None, :]), NO_CANDIDATE)
    for j in tl.static_range(K):
        best = tl.max(key, 1)
        tl.store(keys + at * K + j, best, r < R)
        if j + 1 < K:
            key = tl.where(key == best[:, None], NO_CANDIDATE, key)


@triton.jit
def merge(
    keys, maxima, sums,
    values,  # [R, K]
    ids,  # int64 [R, K]
    tile_count,
    K: tl.constexpr, BLOCK_TILES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):
    """One row: its log-sum-exp and the first K of its candidates."""
    r = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK_TILES)
    largest = tl.full((BLOCK_TILES,), triton_math.LOWEST, tl.float32)
    total = tl.zeros((BLOCK_TILES,), tl.float32)
    for t0 in range(0, tile_count, BLOCK_TILES):
        inside = t0 + t < tile_count
        most = tl.load(maxima + r * tile_count + t0 + t, inside, triton_math.LOWEST)
        part = tl.load(sums + r * tile_count + t0 + t, inside, 0.0)
        top = tl.maximum(largest, most)
        total = total * tl.exp(largest - top) + part * tl.exp(most - top)
        largest = top
    top, total = triton_math.join_exp(largest, total)
    log_total = tl.log(total)
    lane = tl.arange(0, BLOCK_KEYS)
    count = tile_count * K
    # What is left is below what was found last: each pass reads the candidates again.
    bound = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
    for j in range(K):
        best = tl.full((BLOCK_KEYS,), NO_CANDIDATE, tl.int64)
        for c0 in range(0, count, BLOCK_KEYS):
            inside = c0 + lane < count
            key = tl.load(keys + r * count + c0 + lane, inside, NO_CANDIDATE)
            best = tl.maximum(best, tl.where(key < bound, key, NO_CANDIDATE))
        bound = tl.max(best, 0)
        value = (logit_of(bound) - top) - log_total
        tl.store(values + r * K + j, triton_math.rounded(value, values.dtype.element_ty))
        tl.store(ids + r * K + j, class_of(bound))


@triton.jit
def select(
    done, length, score,  # bool, int64, float32 [B, BEAM]
    values, ids,  # [B, BEAM, K], ids int64
    state,  # [B, BEAM, H]
    new_last, new_done, new_length, new_score, new_state, parents,  # as above, int64 words, parents
    H, eos,
    BEAM: tl.constexpr, K: tl.constexpr, CANDIDATES: tl.constexpr, BLOCK_H: tl.constexpr,
):
    """One hypothesis of one image: of its BEAM K candidates the one that so many come before."""
    b = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1)
    c = tl.arange(0, CANDIDATES)
    inside = c < BEAM * K
    at = b * BEAM + c // K
    over = tl.load(done + at, inside, 0) != 0
    value = tl.load(values + b * BEAM * K + c, inside, 0.0).to(tl.float32)
    value = tl.where(over, tl.where(c % K == 0, 0.0, -float("inf")), value)
    total = tl.load(score + at, inside, 0.0) + value
    tokens = tl.load(length + at, inside, 1) + tl.where(over, 0, 1)
    # Rounded to nearest: candidates tie where torch's do.
    per_token = tl.div_rn(total, tokens.to(tl.float32))
    key = tl.where(inside, as_key(per_token, c), NO_CANDIDATE)
    best = tl.max(key, 0)
    for _ in range(place):
        key = tl.where(key == best, NO_CANDIDATE, key)
        best = tl.max(key, 0)
    chosen = class_of(best).to(tl.int32)
    mine = c == chosen
    word = tl.load(ids + b * BEAM * K + c, inside, 0)
    last = tl.sum(tl.where(mine, tl.where(over, eos, word), 0), 0)
    ended = tl.sum(tl.where(mine & over, 1, 0), 0)
    parent = chosen // K
    to = b * BEAM + place
    tl.store(new_last + to, last)
    tl.store(new_done + to, (ended > 0) | (last == eos))
    tl.store(new_length + to, tl.sum(tl.where(mine, tokens, 0), 0))
    tl.store(new_score + to, tl.sum(tl.where(mine, total, 0.0), 0))
    tl.store(parents + to, parent.to(tl.int64))
    for h0 in range(0, H, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        x = tl.load(state + (b * BEAM + parent) * H + h, h < H)
        tl.store(new_state + to * H + h, x, h < H)
