"""Triton functions of the epilogue, for every kernel of this op: activation, pool, what is saved.

Tiles are [pixels, channels] with K_LAST (channels_last) and [channels, pixels] without, so that
the threads of a warp lie along memory in both layouts.
"""

import triton
import triton.language as tl

from mbm_kernels._core import triton_math

SLOPE_BIT = tl.constexpr(128)  # in the saved byte; the place in the window is in the other seven
SQRT_HALF = tl.constexpr(0.7071067811865476)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def across(pixels, channels, K_LAST: tl.constexpr):
    """pixels [P] + channels [K] as a tile."""
    return pixels[:, None] + channels[None, :] if K_LAST else channels[:, None] + pixels[None, :]


@triton.jit
def inside(pixels, channels, K_LAST: tl.constexpr):
    """Where both hold, as a tile."""
    return pixels[:, None] & channels[None, :] if K_LAST else channels[:, None] & pixels[None, :]


@triton.jit
def along_channels(channels, K_LAST: tl.constexpr):
    return channels[None, :] if K_LAST else channels[:, None]


@triton.jit
def divide(n, by):
    """n // by where neither is negative: unsigned division takes fewer instructions."""
    return (tl.cast(n, tl.uint32) // tl.cast(by, tl.uint32)).to(tl.int32)


@triton.jit
def split_pixel(p, rows, columns):
    """Image, row and column of pixels counted in order."""
    line = divide(p, columns)
    b = divide(line, rows)
    return b, line - b * rows, p - line * columns


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def gelu_tanh_inner(z):
    return (z + z * z * z * CUBIC) * SQRT_2_OVER_PI


@triton.jit
def activate(z, ACT: tl.constexpr):
    """Comparisons stand so that NaN stays NaN, as in torch."""
    if ACT == "relu":
        y = tl.where(z <= 0, 0.0, z)
    elif ACT == "relu6":
        y = tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))
    elif ACT == "leaky_relu":
        y = tl.where(z > 0, z, 0.01 * z)
    elif ACT == "silu":
        y = z * sigmoid(z)
    elif ACT == "gelu":
        y = z * 0.5 * (1.0 + tl.erf(z * SQRT_HALF))
    elif ACT == "gelu_tanh":
        y = 0.5 * z * (1.0 + triton_math.tanh(gelu_tanh_inner(z)))
    elif ACT == "hardswish":
        y = z * activate(z + 3.0, "relu6") / 6.0
    elif ACT == "sigmoid":
        y = sigmoid(z)
    elif ACT == "tanh":
        y = triton_math.tanh(z)
    else:
        y = z
    return y


@triton.jit
def derivative(z, ACT: tl.constexpr):
    """Of the activations that save z."""
    if ACT == "silu":
        s = sigmoid(z)
        slope = s * (1.0 + z * (1.0 - s))
    elif ACT == "gelu":
        slope = 0.5 * (1.0 + tl.erf(z * SQRT_HALF)) + z * INV_SQRT_2PI * tl.exp(-0.5 * z * z)
    elif ACT == "gelu_tanh":
        t = triton_math.tanh(gelu_tanh_inner(z))
        inner = (1.0 + z * z * (3.0 * CUBIC)) * SQRT_2_OVER_PI
        slope = 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * inner
    elif ACT == "hardswish":
        slope = tl.where(z <= -3, 0.0, tl.where(z < 3, (2.0 * z + 3.0) / 6.0, 1.0))
    elif ACT == "sigmoid":
        s = sigmoid(z)
        slope = s * (1.0 - s)
    else:
        tl.static_assert(ACT == "tanh")
        t = triton_math.tanh(z)
        slope = 1.0 - t * t
    return slope


@triton.jit
def rank(z, ACT: tl.constexpr):
    """What a pool compares: the activated value, or z where that gives the same gradients."""
    return z if ACT == "relu" or ACT == "relu6" else activate(z, ACT)


@triton.jit
def pool_step(best, best_z, place, z, tap, use, ACT: tl.constexpr):
    """One more pixel z of a window, the tap-th; `place` is -1 before the first.

    As in torch the first of equal values stays and NaN replaces anything.
    """
    ranked = rank(z, ACT)
    take = use & ((ranked > best) | (ranked != ranked) | (place < 0))
    return tl.where(take, ranked, best), tl.where(take, z, best_z), tl.where(take, tap, place)


@triton.jit
def pool_first(z, ACT: tl.constexpr):
    """The first pixel of a window without padding: best, best_z, place."""
    return rank(z, ACT), z, tl.zeros(z.shape, tl.int32)


@triton.jit
def pool_next(best, best_z, place, z, tap, ACT: tl.constexpr):
    """Another pixel of a window without padding."""
    ranked = rank(z, ACT)
    take = (ranked > best) | (ranked != ranked)
    return tl.where(take, ranked, best), tl.where(take, z, best_z), tl.where(take, tap, place)


@triton.jit
def emit(
    best, best_z, place, at, code_at, use,
    y,  # [B, K, Y'', X'']
    places,  # uint8 [B, Y'', X'', K] or None
    z,  # [B, Y'', X'', K] or None
    ACT: tl.constexpr,
):
    """Stores the output, and for a backward the place with the slope's bit, and z."""
    out = activate(best, ACT) if ACT == "relu" or ACT == "relu6" else best
    tl.store(y + at, out.to(y.dtype.element_ty), use)
    if places is not None:
        if ACT == "relu":
            code = tl.where(best <= 0, place, place + SLOPE_BIT)
        elif ACT == "relu6":
            code = tl.where((best <= 0) | (best >= 6), place, place + SLOPE_BIT)
        elif ACT == "leaky_relu":
            code = tl.where(best > 0, place + SLOPE_BIT, place)
        else:
            code = place
        tl.store(places + code_at, code.to(tl.uint8), use)
    if z is not None:
        tl.store(z + code_at, best_z.to(z.dtype.element_ty), use)


@triton.jit
def grad_window(grad_y, places, z, at, code_at, use, ACT: tl.constexpr):
    """The gradient of each window's largest value before the activation, and its place."""
    g = tl.load(grad_y + at, use, 0.0).to(tl.float32)
    place = tl.zeros(g.shape, tl.int32)
    if places is not None:
        code = tl.load(places + code_at, use, 0).to(tl.int32)
        place = code & (SLOPE_BIT - 1)
        if ACT == "relu" or ACT == "relu6":
            g = tl.where(code >= SLOPE_BIT, g, 0.0)
        elif ACT == "leaky_relu":
            g = tl.where(code >= SLOPE_BIT, g, 0.01 * g)
    if z is not None:
        g *= derivative(tl.load(z + code_at, use, 0.0).to(tl.float32), ACT)
    return g, place
