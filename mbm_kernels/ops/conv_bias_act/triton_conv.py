"""Triton kernels that convolve: implicit GEMM with its epilogue, its weight gradient, depthwise.

The maths is in NOTES.md, "The Triton kernels". Letters with C count what is summed over, so that
for the gradient of x, where x stands for grad_z, C and K change places.
"""

import triton
import triton.language as tl

from mbm_kernels._core import triton_math
from mbm_kernels.ops.conv_bias_act.triton_epilogue import (
    across,
    along_channels,
    emit,
    inside,
    pool_first,
    pool_next,
    split_pixel,
)


@triton.jit
def gather(
    x, at, row, column, has_p, reach, r, s, has_c, Y, X,
    FLAT: tl.constexpr, P_FIRST: tl.constexpr,
):
    """Pixels (row, column) moved by tap (r, s): [P, C], or [C, P] without P_FIRST.

    `at` [P] and `reach` [C] are the offsets of pixel and of tap and channel. FLAT: r and s are [C].
    """
    if FLAT:
        rows = row[None, :] + r[:, None]
        columns = column[None, :] + s[:, None]
        # All four are at least 0 where their signs' OR is.
        within = (rows | (Y - 1 - rows) | columns | (X - 1 - columns)) >= 0
        use = within & has_p[None, :] & has_c[:, None]
        tile = tl.load(x + (at[None, :] + reach[:, None]), use, 0.0)
        if P_FIRST:
            tile = tl.trans(tile)
    else:
        rows = row + r
        columns = column + s
        within = has_p & (rows >= 0) & (rows < Y) & (columns >= 0) & (columns < X)
        if P_FIRST:
            tile = tl.load(
                x + (at[:, None] + reach[None, :]), within[:, None] & has_c[None, :], 0.0
            )
        else:
            tile = tl.load(
                x + (at[None, :] + reach[:, None]), within[None, :] & has_c[:, None], 0.0
            )
    return tile


@triton.jit
def gather_dot(
    total, x, w, at, row, column, has_p, reach, r, s, has_c, Y, X,
    FLAT: tl.constexpr, P_FIRST: tl.constexpr, TF32: tl.constexpr,
):
    tile = gather(x, at, row, column, has_p, reach, r, s, has_c, Y, X, FLAT, P_FIRST)
    if P_FIRST:
        total = triton_math.dot(tile, w, total, TF32)
    else:
        total = triton_math.dot(w, tile, total, TF32)
    return total


@triton_math.launched
def conv(
    x,  # [B, C, Y, X]
    weight,  # [K, C, R, S]
    bias,  # [K] or None
    residual,  # [B, K, Y', X'] or None
    y,  # [B, K, Y'', X'']
    places,  # uint8 [B, Y'', X'', K] or None
    z,  # [B, Y'', X'', K] or None
    B, C, K, Y, X, YO, XO, top, left, x_b, x_c, x_y, x_x, w_k, w_c, w_r, w_s, bias_k,
    residual_b, residual_k, residual_y, residual_x, y_b, y_k, y_y, y_x,
    ACT: tl.constexpr, K_LAST: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, TURN: tl.constexpr, POOL: tl.constexpr,
    TF32: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, FLAT: tl.constexpr,
):
    """BLOCK_P pixels of the output, BLOCK_K channels. POOL is 1 or 2: a 2x2 pool's four pixels are
    four accumulators of one tile, fed by one tile of the weight. TURN turns the kernel by 180
    degrees. FLAT sums over taps and channels as one index, else BLOCK_C channels of one tap."""
    blocks_k = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    p = pid // blocks_k * BLOCK_P + tl.arange(0, BLOCK_P)
    k = pid % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    b, i, j = split_pixel(p, YO, XO)
    has_p = b < B
    has_k = k < K
    b = b.to(tl.int64)
    k64 = k.to(tl.int64)
    row = i * (POOL * STRIDE_Y) - top
    column = j * (POOL * STRIDE_X) - left
    at = b * x_b + row.to(tl.int64) * x_y + column * x_x
    if K_LAST:
        acc0 = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    else:
        acc0 = tl.zeros((BLOCK_K, BLOCK_P), tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    steps = tl.cdiv(R * S * C, BLOCK_C) if FLAT else R * S * tl.cdiv(C, BLOCK_C)
    for step in range(0, steps):
        if FLAT:
            n = step * BLOCK_C + tl.arange(0, BLOCK_C)
            r, s, c = split_pixel(n, S, C)
            has_c = n < R * S * C
        else:
            c = step // (R * S) * BLOCK_C + tl.arange(0, BLOCK_C)
            r = step % (R * S) // S
            s = step % S
            has_c = c < C
        c64 = c.to(tl.int64)
        reach = c64 * x_c + r * x_y + s * x_x
        if TURN:
            tap = c64 * w_c + (R - 1 - r) * w_r + (S - 1 - s) * w_s
        else:
            tap = c64 * w_c + r * w_r + s * w_s
        w_at = weight + across(tap, k64 * w_k, K_LAST)
        w = tl.load(w_at, inside(has_c, has_k, K_LAST), 0.0)
        acc0 = gather_dot(
            acc0, x, w, at, row, column, has_p, reach, r, s, has_c, Y, X, FLAT, K_LAST, TF32
        )
        if POOL == 2:
            acc1 = gather_dot(
                acc1, x, w, at + STRIDE_X * x_x, row, column + STRIDE_X,
                has_p, reach, r, s, has_c, Y, X, FLAT, K_LAST, TF32,
            )
            acc2 = gather_dot(
                acc2, x, w, at + STRIDE_Y * x_y, row + STRIDE_Y, column,
                has_p, reach, r, s, has_c, Y, X, FLAT, K_LAST, TF32,
            )
            acc3 = gather_dot(
                acc3, x, w, at + (STRIDE_Y * x_y + STRIDE_X * x_x), row + STRIDE_Y,
                column + STRIDE_X, has_p, reach, r, s, has_c, Y, X, FLAT, K_LAST, TF32,
            )

    use = inside(has_p, has_k, K_LAST)
    shift = load_bias(bias, k, has_k, bias_k, K_LAST)
    first = b * residual_b + (i * POOL).to(tl.int64) * residual_y + j * POOL * residual_x
    more = across(first, k64 * residual_k, K_LAST)
    v = finish(acc0, shift, residual, more, use)
    best, best_z, place = pool_first(v, ACT)
    if POOL == 2:
        v = finish(acc1, shift, residual, more + residual_x, use)
        best, best_z, place = pool_next(best, best_z, place, v, 1, ACT)
        v = finish(acc2, shift, residual, more + residual_y, use)
        best, best_z, place = pool_next(best, best_z, place, v, 2, ACT)
        v = finish(acc3, shift, residual, more + (residual_y + residual_x), use)
        best, best_z, place = pool_next(best, best_z, place, v, 3, ACT)
    to = across(b * y_b + i.to(tl.int64) * y_y + j * y_x, k64 * y_k, K_LAST)
    emit(best, best_z, place, to, across(p.to(tl.int64) * K, k64, K_LAST), use, y, places, z, ACT)


@triton.jit
def load_bias(bias, k, has_k, bias_k, K_LAST: tl.constexpr):
    shift = tl.zeros(k.shape, tl.float32)
    if bias is not None:
        shift = tl.load(bias + k * bias_k, has_k, 0.0).to(tl.float32)
    return along_channels(shift, K_LAST)


@triton.jit
def finish(total, shift, residual, at, use):
    v = total + shift
    if residual is not None:
        v += tl.load(residual + at, use, 0.0).to(tl.float32)
    return v


@triton_math.launched
def conv_grad_weight(
    grad_z,  # [B, K, Y', X']
    x,  # [B, C, Y, X]
    parts,  # float32 [blocks of pixels, K, R, S, C]: shares of the gradient
    B, C, K, Y, X, YC, XC, chunk, top, left, grad_b, grad_k, grad_y, grad_x, x_b, x_c, x_y, x_x,
    R: tl.constexpr, S: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    TF32: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """BLOCK_K channels by BLOCK_N taps and channels of x, summed over `chunk` pixels."""
    blocks_n = tl.cdiv(R * S * C, BLOCK_N)
    blocks_k = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    n = pid % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = pid // blocks_n % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    part = (pid // (blocks_n * blocks_k)).to(tl.int64)
    r, s, c = split_pixel(n, S, C)
    has_n = n < R * S * C
    reach = c.to(tl.int64) * x_c + r * x_y + s * x_x
    total = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    start = part.to(tl.int32) * chunk
    end = tl.minimum(start + chunk, B * YC * XC)
    for p0 in range(start, end, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        has_p = p < end
        b, i, j = split_pixel(p, YC, XC)
        b64 = b.to(tl.int64)
        from_at = b64 * grad_b + i.to(tl.int64) * grad_y + j * grad_x
        g_at = grad_z + from_at[:, None] + k.to(tl.int64)[None, :] * grad_k
        g = tl.load(g_at, has_p[:, None] & (k < K)[None, :], 0.0)
        row = i * STRIDE_Y - top
        column = j * STRIDE_X - left
        at = b64 * x_b + row.to(tl.int64) * x_y + column * x_x
        rows = row[:, None] + r[None, :]
        columns = column[:, None] + s[None, :]
        within = (rows | (Y - 1 - rows) | columns | (X - 1 - columns)) >= 0
        use = within & has_p[:, None] & has_n[None, :]
        tile = tl.load(x + (at[:, None] + reach[None, :]), use, 0.0)
        total = triton_math.dot(tl.trans(g), tile, total, TF32)
    to = parts + (part * K + k[:, None]) * (R * S * C) + n[None, :]
    tl.store(to, total, (k < K)[:, None] & has_n[None, :])


@triton_math.launched
def depthwise(
    x,  # [B, K, Y, X]
    weight,  # [K, 1, R, S]
    bias, residual, y, places, z,  # as conv's
    B, K, Y, X, YO, XO, top, left, x_b, x_k, x_y, x_x, w_k, w_r, w_s, bias_k,
    residual_b, residual_k, residual_y, residual_x, y_b, y_k, y_y, y_x,
    ACT: tl.constexpr, K_LAST: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, TURN: tl.constexpr, POOL: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """BLOCK_P pixels of the output, BLOCK_K channels, each convolved alone; POOL is 1 or 2."""
    blocks_k = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    p = pid // blocks_k * BLOCK_P + tl.arange(0, BLOCK_P)
    k = pid % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    b, i, j = split_pixel(p, YO, XO)
    has_p = b < B
    has_k = k < K
    b = b.to(tl.int64)
    k64 = k.to(tl.int64)
    use = inside(has_p, has_k, K_LAST)
    shift = load_bias(bias, k, has_k, bias_k, K_LAST)
    for tap in tl.static_range(POOL * POOL):
        row = (i * POOL + tap // POOL) * STRIDE_Y - top
        column = (j * POOL + tap % POOL) * STRIDE_X - left
        first = b * x_b + row.to(tl.int64) * x_y + column * x_x
        at = x + across(first, k64 * x_k, K_LAST)
        total = tl.zeros(use.shape, tl.float32)
        for r in range(0, R):
            for s in tl.static_range(S):
                w_at = (R - 1 - r) * w_r + (S - 1 - s) * w_s if TURN else r * w_r + s * w_s
                w = tl.load(weight + k64 * w_k + w_at, has_k, 0.0).to(tl.float32)
                rows = row + r
                columns = column + s
                within = has_p & (rows >= 0) & (rows < Y) & (columns >= 0) & (columns < X)
                v = tl.load(at + (r * x_y + s * x_x), inside(within, has_k, K_LAST), 0.0)
                total += v.to(tl.float32) * along_channels(w, K_LAST)
        first = b * residual_b + (i * POOL + tap // POOL).to(tl.int64) * residual_y
        first += (j * POOL + tap % POOL) * residual_x
        v = finish(total, shift, residual, across(first, k64 * residual_k, K_LAST), use)
        if tap == 0:
            best, best_z, place = pool_first(v, ACT)
        else:
            best, best_z, place = pool_next(best, best_z, place, v, tap, ACT)
    to = across(b * y_b + i.to(tl.int64) * y_y + j * y_x, k64 * y_k, K_LAST)
    emit(best, best_z, place, to, across(p.to(tl.int64) * K, k64, K_LAST), use, y, places, z, ACT)


@triton_math.launched
def depthwise_grad_weight(
    grad_z,  # [B, K, Y', X']
    x,  # [B, K, Y, X]
    parts,  # float32 [blocks of pixels, R S, K]: shares of the gradient
    B, K, Y, X, YC, XC, chunk, top, left, grad_b, grad_k, grad_y, grad_x, x_b, x_k, x_y, x_x,
    K_LAST: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """One tap, BLOCK_K channels, `chunk` pixels."""
    blocks_k = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    tap = pid % (R * S)
    k = pid // (R * S) % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    part = pid // (R * S * blocks_k)
    k64 = k.to(tl.int64)
    if K_LAST:
        total = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    else:
        total = tl.zeros((BLOCK_K, BLOCK_P), tl.float32)
    start = part * chunk
    end = tl.minimum(start + chunk, B * YC * XC)
    for p0 in range(start, end, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        has_p = p < end
        b, i, j = split_pixel(p, YC, XC)
        row = i * STRIDE_Y - top + tap // S
        column = j * STRIDE_X - left + tap % S
        within = has_p & (row >= 0) & (row < Y) & (column >= 0) & (column < X)
        use = inside(within, k < K, K_LAST)
        b64 = b.to(tl.int64)
        from_at = b64 * grad_b + i.to(tl.int64) * grad_y + j * grad_x
        g = tl.load(grad_z + across(from_at, k64 * grad_k, K_LAST), use, 0.0)
        at = b64 * x_b + row.to(tl.int64) * x_y + column * x_x
        v = tl.load(x + across(at, k64 * x_k, K_LAST), use, 0.0)
        total += g.to(tl.float32) * v.to(tl.float32)
    to = parts + (part.to(tl.int64) * (R * S) + tap) * K + k
    tl.store(to, tl.sum(total, 0 if K_LAST else 1), k < K)
