"""Triton kernels of additive attention; the maths is in NOTES.md, "The Triton kernels".

Positions past a row's length are never read.
"""

import triton
import triton.language as tl

from mbm_kernels._core import triton_math
from mbm_kernels.ops.additive_attention.triton_scores import (
    ROW_PADDING,
    any_direct,
    largest_of_v,
    largest_sizes,
    magnitude,
    scores_directly,
    scores_from_powers,
)

POWER_LIMIT = tl.constexpr(20.0)  # of |query| + |key|: a product of two sums stays below e^81
CENTRED_LIMIT = tl.constexpr(1.0)  # of the same: below it scores have relative accuracy
POWER_V_LIMIT = tl.constexpr(1e3)  # of |v|: 1e3 e^81 is a float
PAIR_LIMIT = tl.constexpr(15.0)  # of query + shift: a product of two E stays below e^62
TERM_LIMIT = tl.constexpr(43.0)  # of |query| and |key|: e^86 is a float, e^-86 not subnormal
V_LIMIT = tl.constexpr(1e10)
HALF_LN2 = tl.constexpr(0.34657359)


@triton_math.launched
def powers(
    query,  # [B, T, D]
    key,  # [B, S, D]
    v,  # [D]
    query_powers,  # [B, D' / 2, T', 3, 2]: e^-2q, -v e^-2q, -v expm1(-2q) of two features; or None
    query_sizes,  # [B, T]: max |q|
    key_powers,  # [B, 2, D', S]: e^2k, expm1(2k); or None
    key_sizes,  # [B, S]: max |k|
    T, S, D, query_b, query_t, query_d, key_b, key_s, key_d, v_d,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """BLOCK_R keys or, past the last block of keys, queries: what tanh(q + k) is made of.

    D' is D made even, by a feature of 0 with v = 0, and T' is T padded, by what nobody uses: loops
    over features need no mask. S or T is 0 where only queries or only keys are asked for.
    """
    b = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    even = D + D % 2
    key_blocks = 0
    if key_powers is not None:
        key_blocks = tl.cdiv(S, BLOCK_R)
        if block < key_blocks:
            k_at = key + b * key_b
            key_rows(
                k_at, key_powers + b * 2 * even * S, key_sizes + b * S, block * BLOCK_R, S, D,
                key_s, key_d, BLOCK_R, BLOCK_D,
            )
    if query_powers is not None:
        padded = tl.cdiv(T, ROW_PADDING) * ROW_PADDING
        if block >= key_blocks:
            q_at = query + b * query_b
            query_rows(
                q_at, v, query_powers + b * 3 * even * padded, query_sizes + b * T,
                (block - key_blocks) * BLOCK_R, T, padded, D, query_t, query_d, v_d, BLOCK_R,
                BLOCK_D,
            )


@triton.jit
def key_rows(
    key, out, sizes, first, S, D, key_s, key_d, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    s = first + tl.arange(0, BLOCK_R)
    even = D + D % 2
    largest = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        k = triton_math.load_tile(key, s, d, S, D, key_s, key_d).to(tl.float32)
        largest = tl.maximum(largest, magnitude(k))
        power = triton_math.exp_exact(2.0 * k)
        triton_math.store_tile(out, power, s, d, S, even, 1, S)
        triton_math.store_tile(out + even * S, triton_math.expm1(2.0 * k), s, d, S, even, 1, S)
    tl.store(sizes + s, tl.max(largest, 1), s < S)


@triton.jit
def query_rows(
    query, v, out, sizes, first, T, padded, D, query_t, query_d, v_d,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):
    t = first + tl.arange(0, BLOCK_R)
    even = D + D % 2
    largest = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        q = triton_math.load_tile(query, t, d, T, D, query_t, query_d).to(tl.float32)
        largest = tl.maximum(largest, magnitude(q))
        w = -tl.load(v + d * v_d, d < D, 0.0).to(tl.float32)[None, :]
        power = triton_math.exp_exact(-2.0 * q)
        to = out + t[:, None] * 6 + (d // 2)[None, :] * (6 * padded) + (d % 2)[None, :]
        use = (t < T)[:, None] & (d < even)[None, :]
        tl.store(to, power, use)
        tl.store(to + 2, w * power, use)
        tl.store(to + 4, w * triton_math.expm1(-2.0 * q), use)
    tl.store(sizes + t, tl.max(largest, 1), t < T)


@triton_math.launched
def factors(
    query,  # [B, T, D]
    key,  # [B, S, D]
    v,  # [D]
    lengths,  # [B] int64 or None
    query_factors,  # [B, 2, T, D]: a = expm1(2 (query + c)), e^(2 (query + c))
    key_factors,  # [B, 2, S, D]: b = expm1(2 (key - c)), y = e^(2 (key - c))
    direct,  # int32 [B, blocks of D]: 1 where tanh must be computed for each pair
    T, S, D, query_b, query_t, query_d, key_b, key_s, key_d, v_d,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """One batch element, BLOCK_D features: factors of all rows, and whether they may be used.

    The shift c is a multiple of ln(2) / 2 near the largest key, so that it only moves exponents.
    """
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    count = S
    if lengths is not None:
        count = tl.minimum(tl.maximum(tl.load(lengths + b), 0), S).to(tl.int32)
    rows = tl.arange(0, BLOCK_R)

    largest_k = tl.full((BLOCK_D, BLOCK_R), -float("inf"), tl.float32)
    sizes_k = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    for s0 in range(0, count, BLOCK_R):
        s = s0 + rows
        use = (s < count)[None, :] & inside[:, None]
        at = key + b * key_b + s.to(tl.int64)[None, :] * key_s + d[:, None] * key_d
        k = tl.load(at, use, 0.0).to(tl.float32)
        sizes_k = tl.maximum(sizes_k, magnitude(k))
        largest_k = tl.maximum(largest_k, tl.where(use, k, -float("inf")))
    largest = tl.max(largest_k, 1)
    key_size = tl.max(sizes_k, 1)
    usable = inside & (key_size <= TERM_LIMIT) & (largest > -float("inf"))
    shift = tl.where(usable, largest, 0.0) / HALF_LN2
    shift = tl.where(shift < 0, tl.ceil(shift), tl.floor(shift))

    for s0 in range(0, count, BLOCK_R):
        s = s0 + rows
        use = (s < count)[None, :] & inside[:, None]
        at = key + b * key_b + s.to(tl.int64)[None, :] * key_s + d[:, None] * key_d
        k = tl.load(at, use, 0.0).to(tl.float32)
        y = triton_math.exp_exact(2.0 * k) * tl.exp2(-shift)[:, None]
        centred = tl.where(shift[:, None] == 0, triton_math.expm1(2.0 * k), y - 1.0)
        to = key_factors + b * 2 * D * S + s.to(tl.int64)[None, :] * D + d[:, None]
        tl.store(to, centred, use)
        tl.store(to + D * S, y, use)

    largest_q = tl.full((BLOCK_D, BLOCK_R), -float("inf"), tl.float32)
    sizes_q = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    for t0 in range(0, T, BLOCK_R):
        t = t0 + rows
        use = (t < T)[None, :] & inside[:, None]
        at = query + b * query_b + t.to(tl.int64)[None, :] * query_t + d[:, None] * query_d
        q = tl.load(at, use, 0.0).to(tl.float32)
        sizes_q = tl.maximum(sizes_q, magnitude(q))
        largest_q = tl.maximum(largest_q, tl.where(use, q, -float("inf")))
        e = triton_math.exp_exact(2.0 * q) * tl.exp2(shift)[:, None]
        centred = tl.where(shift[:, None] == 0, triton_math.expm1(2.0 * q), e - 1.0)
        to = query_factors + b * 2 * D * T + t.to(tl.int64)[None, :] * D + d[:, None]
        tl.store(to, centred, use)
        tl.store(to + D * T, e, use)

    query_size = tl.max(tl.max(sizes_q, 1), 0)
    key_size = tl.max(key_size, 0)
    beyond = tl.max(tl.max(largest_q, 1) + shift * HALF_LN2, 0)
    weight = tl.load(v + d * v_d, inside, 0.0).to(tl.float32)
    largest_v = tl.max(magnitude(weight), 0)
    fits = (query_size <= TERM_LIMIT) & (key_size <= TERM_LIMIT)
    fits = fits & (beyond <= PAIR_LIMIT) & (largest_v <= V_LIMIT)
    # NaN fails every comparison, so it counts as not fitting.
    tl.store(direct + b * tl.num_programs(1) + tl.program_id(1), 1 - fits.to(tl.int32))


@triton_math.launched
def attend(
    query, key,
    value,  # [B, S, E]
    v, lengths,
    mask,  # bool, strides of [B, T, S], or None
    query_powers, query_sizes, key_powers, key_sizes,  # of `powers`, or None
    scores,  # float32 [B, T, S], scratch; may be `weights`
    weights,  # [B, T, S]
    context,  # [B, T, E]
    T, S, D, E, query_b, query_t, query_d, key_b, key_s, key_d, value_b, value_s, value_e, v_d,
    mask_b, mask_t, mask_s,
    FAST: tl.constexpr, NVIDIA: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_T queries of one batch element: scores, softmax, context.

    A program alone reads and writes its rows of scores and weights; barriers order the phases.
    """
    b = tl.program_id(0).to(tl.int64)
    t0 = tl.program_id(1) * BLOCK_T
    t = t0 + tl.arange(0, BLOCK_T)
    count = S
    if lengths is not None:
        count = tl.minimum(tl.maximum(tl.load(lengths + b), 0), S).to(tl.int32)
    positions = tl.arange(0, BLOCK_S)
    rows = scores + b * T * S
    if key_powers is not None:
        pair = largest_sizes(query_sizes + b * T, t0, tl.minimum(t0 + BLOCK_T, T), BLOCK_T)
        pair += largest_sizes(key_sizes + b * S, 0, count, BLOCK_S)
        fits = (pair <= POWER_LIMIT) & (largest_of_v(v, D, v_d, BLOCK_S) <= POWER_V_LIMIT)
        if fits and pair <= CENTRED_LIMIT:
            scores_from_powers(
                v, query_powers, key_powers, rows, b, t, count, T, S, D, v_d, True, BLOCK_T,
                BLOCK_S, NVIDIA,
            )
        elif fits:
            scores_from_powers(
                v, query_powers, key_powers, rows, b, t, count, T, S, D, v_d, False, BLOCK_T,
                BLOCK_S, NVIDIA,
            )
        else:
            scores_directly(
                query, key, v, rows, b, t0, count, T, S, D, query_b, query_t, query_d,
                key_b, key_s, key_d, v_d, BLOCK_T, BLOCK_S, BLOCK_D, False, NVIDIA,
            )
    else:
        scores_directly(
            query, key, v, rows, b, t0, count, T, S, D, query_b, query_t, query_d,
            key_b, key_s, key_d, v_d, BLOCK_T, BLOCK_S, BLOCK_D, FAST, NVIDIA,
        )
    tl.debug_barrier()

    lanes = tl.full((BLOCK_T, BLOCK_S), -float("inf"), tl.float32)
    for s0 in range(0, count, BLOCK_S):
        x, use = load_scores(rows, mask, b, t, s0 + positions, T, S, count, mask_b, mask_t, mask_s)
        lanes = tl.maximum(lanes, tl.where(use, x, -float("inf")))
    largest = tl.max(lanes, 1)[:, None]
    lanes = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    for s0 in range(0, count, BLOCK_S):
        x, use = load_scores(rows, mask, b, t, s0 + positions, T, S, count, mask_b, mask_t, mask_s)
        lanes += tl.where(use, tl.exp(x - largest), 0.0)
    scale = 1.0 / tl.sum(lanes, 1)[:, None]
    # Each thread reads the scores that it overwrites, so `scores` may be `weights`. A row with
    # nothing to attend to never uses its scale of 1 / 0.
    for s0 in range(0, S, BLOCK_S):
        s = s0 + positions
        x, use = load_scores(rows, mask, b, t, s, T, S, count, mask_b, mask_t, mask_s)
        p = tl.where(use, tl.exp(x - largest) * scale, 0.0)
        to = weights + b * T * S + t[:, None] * S + s[None, :]
        tl.store(to, p.to(weights.dtype.element_ty), (t < T)[:, None] & (s < S)[None, :])
    tl.debug_barrier()

    for e0 in range(0, E, BLOCK_E):
        e = e0 + tl.arange(0, BLOCK_E)
        sum_e = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
        for s0 in range(0, count, BLOCK_K):
            s = s0 + tl.arange(0, BLOCK_K)
            p_at = weights + b * T * S + t[:, None] * S + s[None, :]
            p = tl.load(p_at, (t < T)[:, None] & (s < count)[None, :], 0.0)
            x_at = value + b * value_b + s.to(tl.int64)[:, None] * value_s + e[None, :] * value_e
            x = tl.load(x_at, (s < count)[:, None] & (e < E)[None, :], 0.0)
            sum_e = triton_math.dot_attended(
                p, p != 0, x, value + b * value_b, s0, count, e, E, value_s, value_e, sum_e,
                mask is not None, BLOCK_K,
            )
        to = context + b * T * E + t[:, None] * E + e[None, :]
        tl.store(to, sum_e.to(context.dtype.element_ty), (t < T)[:, None] & (e < E)[None, :])


@triton.jit
def load_scores(rows, mask, b, t, s, T, S, count, mask_b, mask_t, mask_s):
    """Scores [t, s], and which of them are attended to."""
    use = (t < T)[:, None] & (s < count)[None, :]
    if mask is not None:
        at = mask + b * mask_b + t.to(tl.int64)[:, None] * mask_t + s[None, :] * mask_s
        use = use & (tl.load(at, use, 0) != 0)
    return tl.load(rows + t[:, None] * S + s[None, :], use, 0.0), use


@triton_math.launched
def grad_scores(
    grad_context,  # [B, T, E] or None
    grad_weights,  # [B, T, S] or None
    value,
    weights,  # [B, T, S]
    lengths,
    out,  # float32 [B, T, S]: weights (g - sum over s of weights g)
    T, S, E, context_b, context_t, context_e, weights_b, weights_t, weights_s, value_b,
    value_s, value_e,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):
    """BLOCK_T queries of one batch element: g = grad_context value^T + grad_weights, then softmax's
    backward. `out` holds g between the two passes."""
    b = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    count = S
    if lengths is not None:
        count = tl.minimum(tl.maximum(tl.load(lengths + b), 0), S).to(tl.int32)
    products = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    for s0 in range(0, count, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        use = (t < T)[:, None] & (s < count)[None, :]
        g = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
        if grad_context is not None:
            for e0 in range(0, E, BLOCK_E):
                e = e0 + tl.arange(0, BLOCK_E)
                g_at = grad_context + b * context_b + t.to(tl.int64)[:, None] * context_t
                x = tl.load(g_at + e[None, :] * context_e, (t < T)[:, None] & (e < E)[None, :], 0.0)
                v_at = value + b * value_b + s.to(tl.int64)[None, :] * value_s
                y = tl.load(
                    v_at + e[:, None] * value_e, (s < count)[None, :] & (e < E)[:, None], 0.0
                )
                g = triton_math.dot(x, y, g)
        if grad_weights is not None:
            g_at = grad_weights + b * weights_b + t.to(tl.int64)[:, None] * weights_t
            g += tl.load(g_at + s[None, :] * weights_s, use, 0.0).to(tl.float32)
        at = b * T * S + t[:, None] * S + s[None, :]
        p = tl.load(weights + at, use, 0.0).to(tl.float32)
        # A weight of 0 has no gradient, whatever an unattended value holds.
        g = tl.where(p == 0, 0.0, g)
        products += p * g
        tl.store(out + at, g, use)
    dot = tl.sum(products, 1)
    tl.debug_barrier()
    for s0 in range(0, S, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        at = b * T * S + t[:, None] * S + s[None, :]
        use = (t < T)[:, None] & (s < count)[None, :]
        p = tl.load(weights + at, use, 0.0).to(tl.float32)
        g = tl.load(out + at, use, 0.0)
        g = tl.where(p == 0, 0.0, p * (g - dot[:, None]))
        tl.store(out + at, g, (t < T)[:, None] & (s < S)[None, :])


# Not told that rows begin at a multiple of 16, Triton gives a thread one feature and not four or
# eight, and a warp of 32 features has whole columns: sums over S need no shuffle.
@triton.jit(
    do_not_specialize=triton_math.VARYING,
    do_not_specialize_on_alignment=("D", "key_b", "key_s"),
)
def grad_terms(
    query, key, v, lengths,
    query_factors,  # [B, 2, T, D]
    key_factors,  # [B, 2, S, D]
    direct,
    gradients,  # float32 [B, T, S], of the scores
    grad_query,  # float32 [SPLIT, B, T, D], each part's share
    grad_key,  # float32 [B, S, D]
    grad_v,  # float32 [SPLIT, B, D]
    B, T, S, D, query_b, query_t, query_d, key_b, key_s, key_d, v_d, blocks,
    BLOCKS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """One batch element, BLOCK_D features, every SPLIT-th block of S: all three gradients at once.

    Tiles are [BLOCK_S, BLOCK_D]: with 32 num_warps = BLOCK_D a thread holds a whole column. Two
    queries share one reciprocal. grad_query is added up in memory, by the thread that wrote it.
    """
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    part = tl.program_id(2)
    inside = d < D
    count = S
    if lengths is not None:
        count = tl.minimum(tl.maximum(tl.load(lengths + b), 0), S).to(tl.int32)
    weight = tl.load(v + d * v_d, inside, 0.0).to(tl.float32)
    factored = not any_direct(direct, b, blocks, BLOCKS)
    by_v = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    q_to = grad_query + (part * B + b) * T * D + d
    for s0 in range(part * BLOCK_S, S, SPLIT * BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        use = (s < count)[:, None] & inside[None, :]
        first = s0 == part * BLOCK_S
        by_key = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
        g_at = gradients + b * T * S + s
        if factored:
            k_at = key_factors + b * 2 * S * D + s.to(tl.int64)[:, None] * D + d[None, :]
            centred = tl.load(k_at, use, 0.0)
            y = tl.load(k_at + S * D, use, 0.0)
            a_at = query_factors + b * 2 * T * D + d
            for t in range(0, T, 2):
                more = t + 1 < T
                a0 = tl.load(a_at + t * D, inside, 0.0)[None, :]
                a1 = tl.load(a_at + (t + 1) * D, inside & more, 0.0)[None, :]
                e0 = tl.load(a_at + (T + t) * D, inside, 0.0)[None, :]
                e1 = tl.load(a_at + (T + t + 1) * D, inside & more, 0.0)[None, :]
                g0 = tl.load(g_at + t * S, s < count, 0.0)[:, None]
                g1 = tl.load(g_at + (t + 1) * S, (s < count) & more, 0.0)[:, None]
                m0 = a0 * y + centred
                m1 = a1 * y + centred
                x0 = m0 + 2.0
                x1 = m1 + 2.0
                inverse = triton_math.reciprocal(x0 * x1, NVIDIA)
                r0 = x1 * inverse
                r1 = x0 * inverse
                by_v += g0 * (m0 * r0)
                by_v += g1 * (m1 * r1)
                # 1 - tanh^2 = 4 e^(2 (query + key)) / (1 + e^(2 (query + key)))^2
                p0 = g0 * (e0 * y) * (r0 * r0)
                p1 = g1 * (e1 * y) * (r1 * r1)
                by_key += p0 + p1
                add_to(q_to + t * D, 4.0 * weight * tl.sum(p0, 0), inside, first)
                add_to(q_to + (t + 1) * D, 4.0 * weight * tl.sum(p1, 0), inside & more, first)
            by_key *= 4.0
        else:
            raw_at = key + b * key_b + s.to(tl.int64)[:, None] * key_s + d[None, :] * key_d
            k = tl.load(raw_at, use, 0.0).to(tl.float32)
            for t in range(0, T):
                q_at = query + b * query_b + t * query_t + d * query_d
                q = tl.load(q_at, inside, 0.0).to(tl.float32)[None, :]
                g = tl.load(g_at + t * S, s < count, 0.0)[:, None]
                y = triton_math.tanh(q + k)
                # An unattended key may be anything: its gradient is 0 and stays out of the sums.
                by_v += tl.where(use & (g != 0), g * y, 0.0)
                p = tl.where(use & (g != 0), g * (1.0 - y * y), 0.0)
                by_key += p
                add_to(q_to + t * D, weight * tl.sum(p, 0), inside, first)
        to = grad_key + b * S * D + s.to(tl.int64)[:, None] * D + d[None, :]
        tl.store(to, weight[None, :] * by_key, (s < S)[:, None] & inside[None, :])
    tl.store(grad_v + (part * B + b) * D + d, tl.sum(by_v, 0), inside)


@triton.jit
def add_to(at, x, use, first):
    before = tl.load(at, use & (first == 0), 0.0)
    tl.store(at, before + x, use)
