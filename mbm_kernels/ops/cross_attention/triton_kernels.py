"""Triton kernels of cross attention; the maths is in NOTES.md, "The Triton kernels".

A program works on one head: pointers are moved there first, so helpers take the inner strides only.
Positions past a row's length are never read.
"""

import triton
import triton.language as tl

from mbm_kernels._core import triton_math
from mbm_kernels._core.triton_math import dot, dot_attended, load_tile, rounded, store_tile


@triton.jit
def attended(lengths, b, S):
    """How many positions of batch element b may be attended to."""
    count = S
    if lengths is not None:
        count = tl.minimum(tl.maximum(tl.load(lengths + b), 0), S).to(tl.int32)
    return count


@triton.jit
def scores(
    query, key, mask, t, s, count, T, D, scale, query_t, query_d, key_s, key_d, mask_t, mask_s,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """scale query key^T + mask at [t, s], and which of them are attended to."""
    total = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    for d0 in range(0, D, BLOCK_K):
        d = d0 + tl.arange(0, BLOCK_K)
        q = load_tile(query, t, d, T, D, query_t, query_d)
        k = load_tile(key, d, s, D, count, key_d, key_s)
        total = dot(q, k, total)
    total *= scale
    use = (t < T)[:, None] & (s < count)[None, :]
    if mask is not None:
        at = mask + t.to(tl.int64)[:, None] * mask_t + s[None, :] * mask_s
        if mask.dtype.element_ty == tl.int1:
            use = use & (tl.load(at, use, 0) != 0)
        else:
            added = tl.load(at, use, 0.0).to(tl.float32)
            use = use & (added != -float("inf"))
            total += added
    return total, use


@triton.jit
def row_sums(
    query, key, mask, t, count, T, D, scale, query_t, query_d, key_s, key_d, mask_t, mask_s,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Of each row the largest score and 1 / sum of e^(score - largest), in one pass.

    Each lane keeps its own maximum and sum. A row with nothing to attend to gets 1 / 0, which no
    weight uses.
    """
    top = tl.full((BLOCK_T, BLOCK_S), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    for s0 in range(0, count, BLOCK_S):
        x, use = scores(
            query, key, mask, t, s0 + tl.arange(0, BLOCK_S), count, T, D, scale,
            query_t, query_d, key_s, key_d, mask_t, mask_s, BLOCK_T, BLOCK_S, BLOCK_K,
        )
        x = tl.where(use, x, -float("inf"))
        new = tl.maximum(top, x)
        total *= tl.where(top == new, 1.0, tl.exp(top - new))
        total += tl.where(x != -float("inf"), tl.exp(x - new), 0.0)
        top = new
    largest = tl.max(top, 1)
    total *= tl.where(top == largest[:, None], 1.0, tl.exp(top - largest[:, None]))
    return largest, 1.0 / tl.sum(total, 1)


@triton_math.launched
def attend(
    query,  # [B, N, T, D]
    key,  # [B, N, S, D]
    value,  # [B, N, S, E]
    lengths,  # [B] int64 or None
    mask,  # bool or floating, strides of [B, N, T, S], or None
    context,  # [B, N, T, E]
    heads,  # weights [B, N, T, S], of any floating type, or None
    rows,  # float32 [2, B N, T]: largest score, 1 / sum; or None
    N, T, S, D, E, scale, query_b, query_n, query_t, query_d, key_b, key_n, key_s, key_d,
    value_b, value_n, value_s, value_e, mask_b, mask_n, mask_t, mask_s,
    WHOLE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):
    """BLOCK_T queries of one head, BLOCK_E features of the context.

    WHOLE: all positions lie in one tile, so that scores are computed once and stay in registers.
    """
    head = tl.program_id(0).to(tl.int64)
    b, n = head // N, head % N
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    part = tl.program_id(2)
    e = part * BLOCK_E + tl.arange(0, BLOCK_E)
    count = attended(lengths, b, S)
    query += b * query_b + n * query_n
    key += b * key_b + n * key_n
    value += b * value_b + n * value_n
    if mask is not None:
        mask += b * mask_b + n * mask_n
    if heads is not None:
        heads += head * T * S
    total = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if WHOLE:
        s = tl.arange(0, BLOCK_S)
        x, use = scores(
            query, key, mask, t, s, count, T, D, scale,
            query_t, query_d, key_s, key_d, mask_t, mask_s, BLOCK_T, BLOCK_S, BLOCK_K,
        )
        x = tl.where(use, x, -float("inf"))
        largest = tl.max(x, 1)
        x = tl.where(use, tl.exp(x - largest[:, None]), 0.0)
        inverse = 1.0 / tl.sum(x, 1)
        w = tl.where(use, x * inverse[:, None], 0.0)
        if heads is not None and part == 0:
            store_tile(heads, w, t, s, T, S, S, 1)
        v = load_tile(value, s, e, count, E, value_s, value_e)
        total = dot_attended(
            w, use, v, value, 0, count, e, E, value_s, value_e, total, mask is not None, BLOCK_S
        )
    else:
        largest, inverse = row_sums(
            query, key, mask, t, count, T, D, scale,
            query_t, query_d, key_s, key_d, mask_t, mask_s, BLOCK_T, BLOCK_S, BLOCK_K,
        )
        end = count
        if heads is not None:
            end = S
        for s0 in range(0, end, BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S)
            x, use = scores(
                query, key, mask, t, s, count, T, D, scale,
                query_t, query_d, key_s, key_d, mask_t, mask_s, BLOCK_T, BLOCK_S, BLOCK_K,
            )
            w = tl.where(use, tl.exp(x - largest[:, None]) * inverse[:, None], 0.0)
            if heads is not None and part == 0:
                store_tile(heads, w, t, s, T, S, S, 1)
            v = load_tile(value, s, e, count, E, value_s, value_e)
            total = dot_attended(
                w, use, v, value, s0, count, e, E, value_s, value_e, total,
                mask is not None, BLOCK_S,
            )
    if rows is not None and part == 0:
        tl.store(rows + head * T + t, largest, t < T)
        tl.store(rows + (head + tl.num_programs(0)) * T + t, inverse, t < T)
    store_tile(context + head * T * E, total, t, e, T, E, E, 1)


@triton_math.launched
def mean_weights(
    query, key, lengths, mask, rows,
    weights,  # [B, T, S]
    B, N, T, S, D, scale, query_b, query_n, query_t, query_d, key_b, key_n, key_s, key_d,
    mask_b, mask_n, mask_t, mask_s,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Weights of BLOCK_T queries at BLOCK_S positions, computed again and averaged over heads."""
    b = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    s = tl.program_id(2) * BLOCK_S + tl.arange(0, BLOCK_S)
    count = attended(lengths, b, S)
    query += b * query_b
    key += b * key_b
    if mask is not None:
        mask += b * mask_b
    total = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    for n in range(0, N):
        at = mask
        if mask is not None:
            at = mask + n * mask_n
        x, use = scores(
            query + n * query_n, key + n * key_n, at, t, s, count, T, D, scale,
            query_t, query_d, key_s, key_d, mask_t, mask_s, BLOCK_T, BLOCK_S, BLOCK_K,
        )
        row = rows + (b * N + n) * T + t
        largest = tl.load(row, t < T, 0.0)
        inverse = tl.load(row + tl.cast(B, tl.int64) * N * T, t < T, 0.0)
        total += tl.where(use, tl.exp(x - largest[:, None]) * inverse[:, None], 0.0)
    store_tile(weights + b * T * S, total / N, t, s, T, S, S, 1)


@triton.jit
def weights_at(
    heads, query, key, mask, largest, inverse, t, s, count, T, S, D, scale,
    query_t, query_d, key_s, key_d, mask_t, mask_s,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Weights [t, s], as kept or computed again."""
    if heads is not None:
        w = load_tile(heads, t, s, T, count, S, 1).to(tl.float32)
    else:
        x, use = scores(
            query, key, mask, t, s, count, T, D, scale,
            query_t, query_d, key_s, key_d, mask_t, mask_s, BLOCK_T, BLOCK_S, BLOCK_K,
        )
        w = tl.where(use, tl.exp(x - largest[:, None]) * inverse[:, None], 0.0)
    return w


@triton.jit
def grad_at(
    grad_context, grad_weights, value, t, s, count, T, E, share,
    context_t, context_e, weights_t, weights_s, value_s, value_e,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Gradient of the weights [t, s]: grad_context value^T + share grad_weights."""
    total = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    if grad_context is not None:
        for e0 in range(0, E, BLOCK_K):
            e = e0 + tl.arange(0, BLOCK_K)
            g = load_tile(grad_context, t, e, T, E, context_t, context_e)
            v = load_tile(value, e, s, E, count, value_e, value_s)
            total = dot(g, v, total)
    if grad_weights is not None:
        g = load_tile(grad_weights, t, s, T, count, weights_t, weights_s)
        total += share * g.to(tl.float32)
    return total


@triton.jit
def queries_read(T, count, lengths):
    """How many of T queries products read: none where no position may be attended to."""
    if lengths is not None:
        T = tl.where(count > 0, T, 0)
    return T


@triton.jit
def attending(tile, w, mask):
    """Rows of the tile [t, ..], 0 where none of the weights [t, s] is anything but 0."""
    if mask is not None:
        some = tl.max((w != 0).to(tl.int32), 1) != 0
        tile = tl.where(some[:, None], tile, 0.0).to(tile.dtype)
    return tile


@triton_math.launched
def grad_queries(
    grad_context,  # strides of [B, N, T, E], or None
    grad_weights,  # strides of [B, N, T, S], or None
    query, key, value, lengths, mask, heads,
    grad_query,  # strides of [B, N, T, D]
    grad_key,  # of [B, N, S, D], only where OWNS_T
    grad_value,  # of [B, N, S, E], only where OWNS_T
    grad_mask,  # float32 [B, N, T, S] or None
    rows,  # float32 [3, B N, T], only where not OWNS_T: largest, 1 / sum, sum of weights gradient
    N, T, S, D, E, scale, share, context_b, context_n, context_t, context_e,
    weights_b, weights_n, weights_t, weights_s, query_b, query_n, query_t, query_d,
    key_b, key_n, key_s, key_d, value_b, value_n, value_s, value_e, mask_b, mask_n, mask_t, mask_s,
    to_query_b, to_query_n, to_query_t, to_query_d, to_key_b, to_key_n, to_key_s, to_key_d,
    to_value_b, to_value_n, to_value_s, to_value_e,
    OWNS_T: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """BLOCK_T queries of one head, BLOCK_D features of each gradient.

    OWNS_T: these are all the queries, so that gradients of key and value are whole here too.
    """
    head = tl.program_id(0).to(tl.int64)
    b, n = head // N, head % N
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    part = tl.program_id(2)
    d = part * BLOCK_D + tl.arange(0, BLOCK_D)
    count = attended(lengths, b, S)
    query += b * query_b + n * query_n
    key += b * key_b + n * key_n
    value += b * value_b + n * value_n
    if mask is not None:
        mask += b * mask_b + n * mask_n
    if heads is not None:
        heads += head * T * S
    if grad_context is not None:
        grad_context += b * context_b + n * context_n
    if grad_weights is not None:
        grad_weights += b * weights_b + n * weights_n
    if OWNS_T:
        grad_key += b * to_key_b + n * to_key_n
        grad_value += b * to_value_b + n * to_value_n
    largest = tl.zeros((BLOCK_T,), tl.float32)
    inverse = tl.zeros((BLOCK_T,), tl.float32)
    if heads is None:
        largest, inverse = row_sums(
            query, key, mask, t, count, T, D, scale,
            query_t, query_d, key_s, key_d, mask_t, mask_s, BLOCK_T, BLOCK_S, BLOCK_K,
        )
    sums = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    for s0 in range(0, count, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        w = weights_at(
            heads, query, key, mask, largest, inverse, t, s, count, T, S, D, scale,
            query_t, query_d, key_s, key_d, mask_t, mask_s, BLOCK_T, BLOCK_S, BLOCK_K,
        )
        g = grad_at(
            grad_context, grad_weights, value, t, s, count, T, E, share,
            context_t, context_e, weights_t, weights_s, value_s, value_e, BLOCK_T, BLOCK_S, BLOCK_K,
        )
        sums += tl.where(w != 0, w * g, 0.0)
    sum_s = tl.sum(sums, 1)
    if rows is not None and part == 0:
        each = tl.cast(tl.num_programs(0), tl.int64) * T
        row = rows + head * T + t
        tl.store(row, largest, t < T)
        tl.store(row + each, inverse, t < T)
        tl.store(row + 2 * each, sum_s, t < T)

    read = queries_read(T, count, lengths)
    end = count
    if OWNS_T or grad_mask is not None:
        end = S
    by_query = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for s0 in range(0, end, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        w = weights_at(
            heads, query, key, mask, largest, inverse, t, s, count, T, S, D, scale,
            query_t, query_d, key_s, key_d, mask_t, mask_s, BLOCK_T, BLOCK_S, BLOCK_K,
        )
        g = grad_at(
            grad_context, grad_weights, value, t, s, count, T, E, share,
            context_t, context_e, weights_t, weights_s, value_s, value_e, BLOCK_T, BLOCK_S, BLOCK_K,
        )
        # What is masked may hold anything, and has no gradient.
        g = tl.where(w != 0, w * (g - sum_s[:, None]), 0.0)
        if grad_mask is not None and part == 0:
            store_tile(grad_mask + head * T * S, g, t, s, T, S, S, 1)
        k = load_tile(key, s, d, count, D, key_s, key_d)
        by_query = dot_attended(
            g, g != 0, k, key, s0, count, d, D, key_s, key_d, by_query, mask is not None, BLOCK_S
        )
        if OWNS_T:
            q = attending(load_tile(query, t, d, read, D, query_t, query_d), w, mask)
            g = tl.trans(rounded(g, q.dtype))
            by_key = dot(g, q, tl.zeros((BLOCK_S, BLOCK_D), tl.float32))
            store_tile(grad_key, by_key * scale, s, d, S, D, to_key_s, to_key_d)
            by_value = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
            if grad_context is not None:
                c = load_tile(grad_context, t, d, read, E, context_t, context_e)
                c = attending(c, w, mask)
                by_value = dot(tl.trans(rounded(w, c.dtype)), c, by_value)
            store_tile(grad_value, by_value, s, d, S, E, to_value_s, to_value_e)
    grad_query += b * to_query_b + n * to_query_n
    store_tile(grad_query, by_query * scale, t, d, T, D, to_query_t, to_query_d)


@triton_math.launched
def grad_keys(
    grad_context, grad_weights, query, key, value, lengths, mask, heads, grad_key, grad_value, rows,
    N, T, S, D, E, scale, share, context_b, context_n, context_t, context_e,
    weights_b, weights_n, weights_t, weights_s, query_b, query_n, query_t, query_d,
    key_b, key_n, key_s, key_d, value_b, value_n, value_s, value_e, mask_b, mask_n, mask_t, mask_s,
    to_key_b, to_key_n, to_key_s, to_key_d, to_value_b, to_value_n, to_value_s, to_value_e,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """BLOCK_S positions of one head, BLOCK_D features of both gradients, over all queries."""
    head = tl.program_id(0).to(tl.int64)
    b, n = head // N, head % N
    s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    count = attended(lengths, b, S)
    query += b * query_b + n * query_n
    key += b * key_b + n * key_n
    value += b * value_b + n * value_n
    if mask is not None:
        mask += b * mask_b + n * mask_n
    if heads is not None:
        heads += head * T * S
    if grad_context is not None:
        grad_context += b * context_b + n * context_n
    if grad_weights is not None:
        grad_weights += b * weights_b + n * weights_n
    grad_key += b * to_key_b + n * to_key_n
    grad_value += b * to_value_b + n * to_value_n
    each = tl.cast(tl.num_programs(0), tl.int64) * T
    read = queries_read(T, count, lengths)
    by_key = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    by_value = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for t0 in range(0, T, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        row = rows + head * T + t
        largest = tl.load(row, t < T, 0.0)
        inverse = tl.load(row + each, t < T, 0.0)
        sum_s = tl.load(row + 2 * each, t < T, 0.0)
        w = weights_at(
            heads, query, key, mask, largest, inverse, t, s, count, T, S, D, scale,
            query_t, query_d, key_s, key_d, mask_t, mask_s, BLOCK_T, BLOCK_S, BLOCK_K,
        )
        g = grad_at(
            grad_context, grad_weights, value, t, s, count, T, E, share,
            context_t, context_e, weights_t, weights_s, value_s, value_e, BLOCK_T, BLOCK_S, BLOCK_K,
        )
        g = tl.where(w != 0, w * (g - sum_s[:, None]), 0.0)
        q = attending(load_tile(query, t, d, read, D, query_t, query_d), w, mask)
        by_key = dot(tl.trans(rounded(g, q.dtype)), q, by_key)
        if grad_context is not None:
            c = attending(load_tile(grad_context, t, d, read, E, context_t, context_e), w, mask)
            by_value = dot(tl.trans(rounded(w, c.dtype)), c, by_value)
    store_tile(grad_key, by_key * scale, s, d, S, D, to_key_s, to_key_d)
    store_tile(grad_value, by_value, s, d, S, E, to_value_s, to_value_e)
