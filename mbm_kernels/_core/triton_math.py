"""Functions that Triton kernels share; portable Triton, but for PTX behind a constexpr.

Everything here computes in float32. The hardware's exponential takes x log2(e) rounded once, an
error of |x| eps; where that matters `exp_exact` splits the exponent off first.
"""

import functools

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693359375)  # 9 bits: n LN2_HIGH is exact for |n| < 2^14
LN2_LOW = tl.constexpr(-2.1219444e-4)

LOWEST = tl.constexpr(-3e38)  # where a running maximum begins

# Sizes that change from call to call in training, which no kernel is compiled anew for.
VARYING = ("B", "T")
launched = functools.partial(triton.jit, do_not_specialize=VARYING)

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, total, TF32: tl.constexpr = False):
    """total + a b, summed in float32; float32 operands are rounded to tf32 only with TF32."""
    if INTERPRETED:  # its matrix product takes bfloat16 for integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="tf32" if TF32 else "ieee")


@triton.jit
def exp_exact(x):
    """e^x to 2 ulp for |x| <= 87; 0, infinity and NaN as they fall."""
    n = tl.floor(x * LOG2E + 0.5)
    rest = (x - n * LN2_HIGH) - n * LN2_LOW
    return tl.exp2(rest * LOG2E) * tl.exp2(n)


@triton.jit
def expm1(x):
    """e^x - 1 with relative accuracy; the series has 8 terms where |x| < 0.5."""
    p = 1.0 / 40320.0
    p = p * x + 1.0 / 5040.0
    p = p * x + 1.0 / 720.0
    p = p * x + 1.0 / 120.0
    p = p * x + 1.0 / 24.0
    p = p * x + 1.0 / 6.0
    p = p * x + 0.5
    p = p * x + 1.0
    return tl.where(tl.abs(x) < 0.5, p * x, exp_exact(x) - 1.0)


@triton.jit
def tanh(x):
    """expm1(2 |x|) / (expm1(2 |x|) + 2) with the sign of x; 1 beyond 9.02, where float32 is 1."""
    m = expm1(2.0 * tl.minimum(tl.abs(x), 10.0))
    magnitude = m / (m + 2.0)
    signed = tl.where(x < 0, -magnitude, magnitude)
    return tl.where(x == x, signed, x)


@triton.jit
def tanh_slope(x):
    """1 - tanh(x)^2 with relative accuracy: 4 e / (1 + e)^2, e = e^(-2 |x|)."""
    e = exp_exact(-2.0 * tl.minimum(tl.abs(x), 43.0))
    # Past 43 it is below float32's smallest normal number.
    return tl.where(tl.abs(x) > 43.0, 0.0, 4.0 * (e / ((1.0 + e) * (1.0 + e))))


@triton.jit
def reciprocal(x, NVIDIA: tl.constexpr):
    """1 / x to 1 ulp on NVIDIA, for x of normal size whose reciprocal is too; exact elsewhere.

    A plain division costs ten instructions more there: it scales what is not of normal size.
    """
    if NVIDIA:
        y = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        y = 1.0 / x
    return y


@triton.jit
def tanh_fast(x, NVIDIA: tl.constexpr):
    """tanh to 2^-11, one special-function operation, on NVIDIA; `tanh` elsewhere."""
    if NVIDIA:
        y = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        y = tanh(x)
    return y


@triton.jit
def add_exp(largest, total, x):
    """Per lane: x joins the largest so far and the sum of e^(x - largest); begin with LOWEST, 0.

    One exponential each. An infinity or a NaN makes the sum, or its joining with others, a NaN.
    """
    d = x - largest
    e = tl.exp(-tl.abs(d))
    return tl.where(d > 0, x, largest), tl.where(d > 0, total * e + 1.0, total + e)


@triton.jit
def join_exp(largest, total):
    """The lanes of `add_exp` together: (the largest x, the sum of e^(x - largest))."""
    top = tl.max(largest, 0)
    return top, tl.sum(total * tl.exp(largest - top), 0)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 x as DTYPE, to nearest even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:  # its own conversion cuts the lower half off
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def load_tile(x, i, j, rows, columns, stride_i, stride_j):
    """x[i, j], 0 past the rows and columns."""
    at = x + i.to(tl.int64)[:, None] * stride_i + j[None, :] * stride_j
    return tl.load(at, (i < rows)[:, None] & (j < columns)[None, :], 0.0)


@triton.jit
def store_tile(x, tile, i, j, rows, columns, stride_i, stride_j):
    """x[i, j] = tile, rounded to the type of x, within the rows and columns."""
    at = x + i.to(tl.int64)[:, None] * stride_i + j[None, :] * stride_j
    tile = rounded(tile, x.dtype.element_ty)
    tl.store(at, tile, (i < rows)[:, None] & (j < columns)[None, :])


@triton.jit
def dot_attended(
    w,
    use,
    tile,
    rows,
    first,
    count,
    j,
    columns,
    stride_i,
    stride_j,
    total,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """total + w tile, of which infinities and NaN of the tile meet only the pairs in `use`.

    `tile` holds rows first .. first + BLOCK - 1 of `rows`, up to `count`, and their columns j. Only
    where the tile is not finite are its rows taken one by one.
    """
    a = w
    if w.dtype != tile.dtype:
        a = rounded(w, tile.dtype)
    if MASKED:
        finite = tl.abs(tile.to(tl.float32)) < float("inf")
        total = dot(a, tl.where(finite, tile, 0.0).to(tile.dtype), total)
        if tl.min(tl.min(finite.to(tl.int32), 1), 0) == 0:
            place = tl.arange(0, BLOCK)
            for i in range(0, BLOCK):
                at = rows + tl.cast(first + i, tl.int64) * stride_i + j * stride_j
                row = tl.load(at, (j < columns) & (first + i < count), 0.0).to(tl.float32)
                w_i = tl.sum(tl.where((place == i)[None, :], w, 0.0), 1)
                use_i = tl.sum(((place == i)[None, :] & use).to(tl.int32), 1) != 0
                taken = (tl.abs(row) < float("inf"))[None, :] | ~use_i[:, None]
                total += tl.where(taken, 0.0, w_i[:, None] * row[None, :])
    else:
        total = dot(a, tile, total)
    return total
