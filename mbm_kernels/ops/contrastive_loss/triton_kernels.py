"""Triton kernels of contrastive_loss; the maths is in README.md, "The Triton kernels".

A logit is z = scale x + bias, where x is an image's product with a text; pair n stands at [n, n].
"""

import triton
import triton.language as tl

from mbm_kernels._core import triton_math

# Images of a chunk, where they start, and programs that share them: no kernel is compiled anew for
# them. B is the length of a row in memory, whose divisibility by 16 vectors need.
CHUNK = ("M", "start", "P")


@triton.jit(do_not_specialize=CHUNK)
def infonce_statistics(
    products,  # float32 [M, B], of the images from `start` on
    scale,  # float32, one number
    row_top, row_total,  # float32 [M]: the largest z, the sum of e^(z - it)
    diagonal,  # float32 [M]: z of the pair
    column_top, column_total,  # float32 [programs, B], over each program's rows
    M, B, start, products_n,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """BLOCK_R images: their statistics over all texts, and the texts' over these images."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    s = tl.load(scale)
    largest = tl.full((BLOCK_R, BLOCK_C), triton_math.LOWEST, tl.float32)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    chosen = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    part = tl.program_id(0).to(tl.int64) * B
    for c0 in range(0, B, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        use = (r < M)[:, None] & (c < B)[None, :]
        at = products + r.to(tl.int64)[:, None] * products_n + c[None, :]
        z = tl.where(use, tl.load(at, use, 0.0) * s, -float("inf"))
        largest, total = triton_math.add_exp(largest, total, z)
        chosen += tl.where((start + r)[:, None] == c[None, :], z, 0.0)
        top = tl.maximum(tl.max(z, 0), triton_math.LOWEST)
        tl.store(column_top + part + c, top, c < B)
        tl.store(column_total + part + c, tl.sum(tl.exp(z - top[None, :]), 0), c < B)
    top = tl.max(largest, 1)
    tl.store(row_top + r, top, r < M)
    tl.store(row_total + r, tl.sum(total * tl.exp(largest - top[:, None]), 1), r < M)
    tl.store(diagonal + r, tl.sum(chosen, 1), r < M)


@triton.jit(do_not_specialize=CHUNK)
def infonce_columns(
    part_top, part_total,  # float32 [P, B]
    top, total,  # float32 [B]
    P, B,
    FIRST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """BLOCK_C texts: what P programs found, together with what stands there unless FIRST."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    largest = tl.full((BLOCK_P, BLOCK_C), triton_math.LOWEST, tl.float32)
    sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        use = (p < P)[:, None] & (c < B)[None, :]
        at = p.to(tl.int64)[:, None] * B + c[None, :]
        t = tl.load(part_top + at, use, triton_math.LOWEST)
        n = tl.load(part_total + at, use, 0.0)
        more = tl.maximum(largest, t)
        sums = sums * tl.exp(largest - more) + n * tl.exp(t - more)
        largest = more
    found = tl.max(largest, 0)
    if not FIRST:
        before = tl.load(top + c, c < B, triton_math.LOWEST)
        found = tl.maximum(found, before)
    count = tl.sum(sums * tl.exp(largest - found[None, :]), 0)
    if not FIRST:
        count += tl.load(total + c, c < B, 0.0) * tl.exp(before - found)
    tl.store(top + c, found, c < B)
    tl.store(total + c, count, c < B)


@triton.jit(do_not_specialize=CHUNK)
def infonce_gradients(
    products,  # float32 [M, B], of the images from `start` on
    scale,
    share,  # float32, one number, or None for 1
    row_top, row_total,  # float32 [M]
    column_top, column_total,  # float32 [B]
    by_scale,  # float32 [M]: sums of z's gradient times x
    gradients,  # [M, B] of z, or None; may lie over `products`, rows equally far apart
    B, start, factor, products_n, gradients_n,
    BLOCK_C: tl.constexpr,
):
    """One image: half of softmax along both dimensions less the pair, times factor and share."""
    n = tl.program_id(0).to(tl.int64)
    s = tl.load(scale)
    top = tl.load(row_top + n)
    inverse = 0.5 / tl.load(row_total + n)
    if share is not None:
        factor = factor * tl.load(share)
    sums = tl.zeros((BLOCK_C,), tl.float32)
    for c0 in range(0, B, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        x = tl.load(products + n * products_n + c, c < B, 0.0)
        z = x * s
        g = tl.exp(z - top) * inverse
        by_column = 0.5 / tl.load(column_total + c, c < B, 1.0)
        g += tl.exp(z - tl.load(column_top + c, c < B, float("inf"))) * by_column
        g -= tl.where(c == start + n, 1.0, 0.0)
        g = tl.where(c < B, g, 0.0)
        sums += g * x
        if gradients is not None:
            tl.debug_barrier()  # half precision lies over other products
            to = gradients + n * gradients_n + c
            tl.store(to, (g * factor).to(gradients.dtype.element_ty), c < B)
    tl.store(by_scale + n, tl.sum(sums, 0))


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1 with relative accuracy."""
    u = 1.0 + x
    rounded = tl.where(u == 1.0, 1.0, u - 1.0)
    return tl.where(u == 1.0, x, tl.log(u) * (x / rounded))


@triton.jit(do_not_specialize=CHUNK)
def siglip(
    products,  # float32 [M, B], of the images from `start` on
    scale,
    bias,  # float32, one number, or None
    share,  # float32, one number, or None for 1
    losses,  # float32 [M], sums over texts
    by_scale, by_bias,  # float32 [M]: sums of z's gradient, times x and alone
    gradients,  # [M, B] of z, or None; may lie over `products`, rows equally far apart
    B, start, factor, products_n, gradients_n,
    BLOCK_C: tl.constexpr,
):
    """One image: -log sigmoid of z for its pair and of -z for others; gradients times factor and
    share."""
    n = tl.program_id(0).to(tl.int64)
    s = tl.load(scale)
    shift = 0.0
    if bias is not None:
        shift += tl.load(bias)
    if share is not None:
        factor = factor * tl.load(share)
    terms = tl.zeros((BLOCK_C,), tl.float32)
    sums = tl.zeros((BLOCK_C,), tl.float32)
    plain = tl.zeros((BLOCK_C,), tl.float32)
    for c0 in range(0, B, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        x = tl.load(products + n * products_n + c, c < B, 0.0)
        z = x * s + shift
        pair = c == start + n
        wrong = tl.where(pair, -z, z)  # the loss is softplus of it, its slope sigmoid
        far = tl.abs(wrong)
        e = triton_math.exp_exact(-tl.where(far > 200.0, 200.0, far))
        slope = tl.where(wrong > 0, 1.0, e) / (1.0 + e)
        terms += tl.where(c < B, tl.maximum(wrong, 0.0) + log1p(e), 0.0)
        g = tl.where(c < B, tl.where(pair, -slope, slope), 0.0)
        sums += g * x
        plain += g
        if gradients is not None:
            tl.debug_barrier()  # half precision lies over other products
            to = gradients + n * gradients_n + c
            tl.store(to, (g * factor).to(gradients.dtype.element_ty), c < B)
    tl.store(losses + n, tl.sum(terms, 0))
    tl.store(by_scale + n, tl.sum(sums, 0))
    tl.store(by_bias + n, tl.sum(plain, 0))
