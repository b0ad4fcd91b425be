"""Scores of a block of queries and keys, of factors or of the key itself."""

import triton
import triton.language as tl

from mbm_kernels._core import triton_math

ROW_PADDING = tl.constexpr(16)  # queries of `powers` are padded to a multiple of it


@triton.jit
def magnitude(x):
    """|x|; infinite for NaN."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def any_direct(direct, b, blocks, BLOCKS: tl.constexpr):
    i = tl.arange(0, BLOCKS)
    return tl.max(tl.load(direct + b * blocks + i, i < blocks, 0), 0) != 0


@triton.jit
def largest_sizes(sizes, first, count, BLOCK: tl.constexpr):
    """Of sizes[first : count]."""
    found = tl.zeros((BLOCK,), tl.float32)
    for i0 in range(first, count, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        found = tl.maximum(found, tl.load(sizes + i, i < count, 0.0))
    return tl.max(found, 0)


@triton.jit
def largest_of_v(v, D, v_d, BLOCK: tl.constexpr):
    found = tl.zeros((BLOCK,), tl.float32)
    for d0 in range(0, D, BLOCK):
        d = d0 + tl.arange(0, BLOCK)
        found = tl.maximum(found, magnitude(tl.load(v + d * v_d, d < D, 0.0).to(tl.float32)))
    return tl.max(found, 0)


@triton.jit
def scores_from_powers(
    v, query_powers, key_powers, rows, b, t, count, T, S, D, v_d,
    CENTRED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, NVIDIA: tl.constexpr,
):
    """Two features share one reciprocal; nothing in their loop is masked but v past an odd D.

    Lanes past the length take its last position.
    """
    padded = tl.cdiv(T, ROW_PADDING) * ROW_PADDING
    even = D + D % 2
    for s0 in range(0, count, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        position = tl.minimum(s, count - 1)
        x_at = query_powers + b * 3 * even * padded
        y_at = key_powers + b * 2 * even * S
        w_at = y_at
        if CENTRED:
            w_at += even * S
        total = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
        for d in range(0, D, 2):
            x = x_at + t * 6
            x0 = tl.load(x)[:, None]
            x1 = tl.load(x + 1)[:, None]
            p0 = tl.load(x + (4 if CENTRED else 2))[:, None]
            p1 = tl.load(x + (5 if CENTRED else 3))[:, None]
            y0 = tl.load(y_at + position)[None, :]
            y1 = tl.load(y_at + S + position)[None, :]
            w0 = tl.load(w_at + position)[None, :] if CENTRED else y0
            w1 = tl.load(w_at + S + position)[None, :] if CENTRED else y1
            v0 = tl.load(v + d * v_d).to(tl.float32)
            v1 = tl.load(v + (d + 1) * v_d, d + 1 < D, 0.0).to(tl.float32)
            d0 = x0 + y0
            d1 = x1 + y1
            n = (v0 * w0 + p0) * d1 + (v1 * w1 + p1) * d0
            total += n * triton_math.reciprocal(d0 * d1, NVIDIA)
            x_at += 6 * padded
            y_at += 2 * S
            w_at += 2 * S
        tl.store(rows + t[:, None] * S + s[None, :], total, (t < T)[:, None] & (s < count)[None, :])


@triton.jit
def scores_directly(
    query, key, v, rows, b, t0, count, T, S, D, query_b, query_t, query_d, key_b, key_s, key_d,
    v_d,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, FAST: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    for i in range(0, tl.minimum(BLOCK_T, T - t0)):
        for s0 in range(0, count, BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S)
            terms = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
            for d0 in range(0, D, BLOCK_D):
                d = d0 + tl.arange(0, BLOCK_D)
                q_at = query + b * query_b + (t0 + i) * query_t + d * query_d
                q = tl.load(q_at, d < D, 0.0).to(tl.float32)
                k_at = key + b * key_b + s.to(tl.int64)[:, None] * key_s + d[None, :] * key_d
                k = tl.load(k_at, (s < count)[:, None] & (d < D)[None, :], 0.0).to(tl.float32)
                w = tl.load(v + d * v_d, d < D, 0.0).to(tl.float32)
                if FAST:
                    y = triton_math.tanh_fast(q[None, :] + k, NVIDIA)
                else:
                    y = triton_math.tanh(q[None, :] + k)
                terms += y * w[None, :]
            tl.store(rows + (t0 + i) * S + s, tl.sum(terms, 1), s < count)
