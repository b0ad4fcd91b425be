"""Triton kernels around a convolution; those that convolve are in the files imported here.

The maths is in NOTES.md, "The Triton kernels". Offsets of pixels and channels are int64, pixels
are counted in int32.
"""

import triton
import triton.language as tl

from mbm_kernels._core import triton_math
from mbm_kernels.ops.conv_bias_act.triton_conv import (  # noqa: F401, launched by name
    conv,
    conv_grad_weight,
    depthwise,
    depthwise_grad_weight,
)
from mbm_kernels.ops.conv_bias_act.triton_epilogue import (
    across,
    along_channels,
    emit,
    grad_window,
    inside,
    pool_step,
    split_pixel,
)

# The same function under the names of its tables.
conv_pool = conv  # four accumulators
conv_stem = conv  # few channels
conv_grad_x = conv  # without an epilogue
depthwise_grad_x = depthwise


@triton_math.launched
def epilogue(
    u,  # [B, K, Y', X'], the convolution alone
    bias,  # [K] or None
    residual,  # [B, K, Y', X'] or None
    y,  # [B, K, Y'', X'']
    places,  # uint8 [B, Y'', X'', K] or None
    z,  # [B, Y'', X'', K] or None
    B, K, YC, XC, YO, XO, bias_k, u_b, u_k, u_y, u_x,
    residual_b, residual_k, residual_y, residual_x, y_b, y_k, y_y, y_x,
    ACT: tl.constexpr, K_LAST: tl.constexpr, POOL_Y: tl.constexpr, POOL_X: tl.constexpr,
    STEP_Y: tl.constexpr, STEP_X: tl.constexpr, PAD_Y: tl.constexpr, PAD_X: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """BLOCK_P pixels of the output, BLOCK_K channels: bias, residual, activation, pool."""
    blocks_k = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    p = pid // blocks_k * BLOCK_P + tl.arange(0, BLOCK_P)
    k = pid % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    b, i, j = split_pixel(p, YO, XO)
    use = inside(b < B, k < K, K_LAST)
    top = i * STEP_Y - PAD_Y
    left = j * STEP_X - PAD_X
    b = b.to(tl.int64)
    k64 = k.to(tl.int64)
    u_at = u + across(b * u_b + top.to(tl.int64) * u_y + left * u_x, k64 * u_k, K_LAST)
    shift = tl.zeros((BLOCK_K,), tl.float32)
    if bias is not None:
        shift = tl.load(bias + k * bias_k, k < K, 0.0).to(tl.float32)
    shift = along_channels(shift, K_LAST)
    residual_at = u_at
    if residual is not None:
        first = b * residual_b + top.to(tl.int64) * residual_y + left * residual_x
        residual_at = residual + across(first, k64 * residual_k, K_LAST)

    best = tl.full(use.shape, -float("inf"), tl.float32)
    best_z = best
    place = tl.full(use.shape, -1, tl.int32)
    for r in range(0, POOL_Y):
        for s in tl.static_range(POOL_X):
            best, best_z, place = pool_tap(
                best, best_z, place, r, s, u_at, residual, residual_at, shift, top, left, k < K,
                b < B, YC, XC, u_y, u_x, residual_y, residual_x, ACT, K_LAST, POOL_X,
            )
    at = across(b * y_b + i.to(tl.int64) * y_y + j * y_x, k64 * y_k, K_LAST)
    emit(best, best_z, place, at, across(p.to(tl.int64) * K, k64, K_LAST), use, y, places, z, ACT)


@triton.jit
def pool_tap(
    best, best_z, place, r, s, u_at, residual, residual_at, shift, top, left, has_k, has_b, YC, XC,
    u_y, u_x, residual_y, residual_x,
    ACT: tl.constexpr, K_LAST: tl.constexpr, POOL_X: tl.constexpr,
):
    row = top + r
    column = left + s
    within = has_b & (row >= 0) & (row < YC) & (column >= 0) & (column < XC)
    use = inside(within, has_k, K_LAST)
    v = tl.load(u_at + (r * u_y + s * u_x), use, 0.0).to(tl.float32) + shift
    if residual is not None:
        more = residual_at + (r * residual_y + s * residual_x)
        v += tl.load(more, use, 0.0).to(tl.float32)
    return pool_step(best, best_z, place, v, r * POOL_X + s, use, ACT)


@triton_math.launched
def grad_epilogue(
    grad_y,  # [B, K, Y'', X'']
    places,  # uint8 [B, Y'', X'', K] or None
    z,  # [B, Y'', X'', K] or None
    grad_z,  # [B, K, Y', X'] or None
    parts,  # float32 [blocks of cells, K] or None: shares of grad_bias
    B, K, YC, XC, YO, XO, CY, CX, chunk, grad_b, grad_k, grad_y_y, grad_y_x, z_b, z_k, z_y, z_x,
    ACT: tl.constexpr, K_LAST: tl.constexpr, POOL_Y: tl.constexpr, POOL_X: tl.constexpr,
    STEP_Y: tl.constexpr, STEP_X: tl.constexpr, PAD_Y: tl.constexpr, PAD_X: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """`chunk` cells, BLOCK_K channels. A cell is the STEP_Y x STEP_X pixels where window [i, j]
    starts, [CY, CX] of them in an image; windows that reach it are gathered."""
    blocks_k = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    k = pid % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    k64 = k.to(tl.int64)
    if K_LAST:
        total = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    else:
        total = tl.zeros((BLOCK_K, BLOCK_P), tl.float32)
    start = pid // blocks_k * chunk
    end = tl.minimum(start + chunk, B * CY * CX)
    for p0 in range(start, end, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        has_b = p < end
        b, i, j = split_pixel(p, CY, CX)
        b64 = b.to(tl.int64)
        grad_at = b64 * grad_b + i.to(tl.int64) * grad_y_y + j * grad_y_x
        code_at = (b64 * YO + i) * XO + j
        g, place = grad_window(
            grad_y, places, z, across(grad_at, k64 * grad_k, K_LAST),
            across(code_at * K, k64, K_LAST),
            inside(has_b & (i < YO) & (j < XO), k < K, K_LAST), ACT,
        )
        total += g  # the cell's own windows: each window counts once
        if grad_z is not None:
            first = b64 * z_b + (i * STEP_Y - PAD_Y).to(tl.int64) * z_y + (j * STEP_X - PAD_X) * z_x
            to = grad_z + across(first, k64 * z_k, K_LAST)
            for q in tl.static_range(STEP_Y * STEP_X):
                store_pixel(
                    to, g, place, grad_y, places, z, grad_at, code_at, i, j, has_b, k < K,
                    k64 * grad_k, k64, K, YC, XC, YO, XO, grad_y_y, grad_y_x, z_y, z_x,
                    ACT, K_LAST, POOL_Y, POOL_X, STEP_Y, STEP_X, PAD_Y, PAD_X, q // STEP_X,
                    q % STEP_X,
                )
    if parts is not None:
        to = parts + (pid // blocks_k).to(tl.int64) * K + k
        tl.store(to, tl.sum(total, 0 if K_LAST else 1), k < K)


@triton.jit
def store_pixel(
    to, g, place, grad_y, places, z, grad_at, code_at, i, j, has_b, has_k, grad_c, k64, K, YC, XC,
    YO, XO, grad_y_y, grad_y_x, z_y, z_x,
    ACT: tl.constexpr, K_LAST: tl.constexpr, POOL_Y: tl.constexpr, POOL_X: tl.constexpr,
    STEP_Y: tl.constexpr, STEP_X: tl.constexpr, PAD_Y: tl.constexpr, PAD_X: tl.constexpr,
    ROW: tl.constexpr, COLUMN: tl.constexpr,
):
    """Pixel [ROW, COLUMN] of each cell: of its own window g, and of those that start before it."""
    if ROW < POOL_Y and COLUMN < POOL_X:
        value = tl.where(place == ROW * POOL_X + COLUMN, g, 0.0)
    else:
        value = tl.zeros(g.shape, tl.float32)
    for up in tl.static_range((POOL_Y + STEP_Y - 1) // STEP_Y):
        for back in tl.static_range((POOL_X + STEP_X - 1) // STEP_X):
            if up + back > 0 and ROW + up * STEP_Y < POOL_Y and COLUMN + back * STEP_X < POOL_X:
                fits = (i >= up) & (i - up < YO) & (j >= back) & (j - back < XO)
                behind = grad_at - up * grad_y_y - back * grad_y_x
                other, where = grad_window(
                    grad_y, places, z, across(behind, grad_c, K_LAST),
                    across((code_at - up * XO - back) * K, k64, K_LAST),
                    inside(has_b & fits, has_k, K_LAST), ACT,
                )
                tap = (ROW + up * STEP_Y) * POOL_X + COLUMN + back * STEP_X
                value += tl.where(where == tap, other, 0.0)
    row = i * STEP_Y - PAD_Y + ROW
    column = j * STEP_X - PAD_X + COLUMN
    within = has_b & (row >= 0) & (row < YC) & (column >= 0) & (column < XC)
    at = to + (ROW * z_y + COLUMN * z_x)
    tl.store(at, value.to(to.dtype.element_ty), inside(within, has_k, K_LAST))
