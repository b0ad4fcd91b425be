"""The Triton kernel of concat_linear: one sum over the features of several inputs."""

import triton
import triton.language as tl

from mbm_kernels._core import triton_math


@triton.jit
def add_product(
    total, x, weight, r, k, R, K, C, x_r, x_c, weight_k, weight_c, BLOCK_C: tl.constexpr,
):
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        a = triton_math.load_tile(x, r, c, R, C, x_r, x_c)
        b = triton_math.load_tile(weight, c, k, C, K, weight_c, weight_k)
        total = triton_math.dot(a, b, total)
    return total


@triton.jit(do_not_specialize=("R", "inner"))
def concat(
    x0, w0,  # [R, C0], [K, C0]: an input and its columns of the weight
    x1, w1,  # likewise, or None
    x2, w2,
    x3, w3,
    repeated,  # float32, its strides those of [R / inner, inner, K], or None
    bias,  # [K] or None
    y,  # [R, K]
    R, K, C0, x0_r, x0_c, w0_k, w0_c, C1, x1_r, x1_c, w1_k, w1_c, C2, x2_r, x2_c, w2_k, w2_c,
    C3, x3_r, x3_c, w3_k, w3_c, inner, repeated_o, repeated_i, repeated_k, bias_k,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """BLOCK_R rows and BLOCK_K columns of y: the inputs' products in turn, what repeats, bias."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    total = add_product(total, x0, w0, r, k, R, K, C0, x0_r, x0_c, w0_k, w0_c, BLOCK_C)
    if x1 is not None:
        total = add_product(total, x1, w1, r, k, R, K, C1, x1_r, x1_c, w1_k, w1_c, BLOCK_C)
    if x2 is not None:
        total = add_product(total, x2, w2, r, k, R, K, C2, x2_r, x2_c, w2_k, w2_c, BLOCK_C)
    if x3 is not None:
        total = add_product(total, x3, w3, r, k, R, K, C3, x3_r, x3_c, w3_k, w3_c, BLOCK_C)
    if repeated is not None:
        use = (r < R)[:, None] & (k < K)[None, :]
        place = (r // inner).to(tl.int64) * repeated_o + (r % inner).to(tl.int64) * repeated_i
        total += tl.load(repeated + place[:, None] + k[None, :] * repeated_k, use, 0.0)
    if bias is not None:
        total += tl.load(bias + k * bias_k, k < K, 0.0).to(tl.float32)[None, :]
    triton_math.store_tile(y, total, r, k, R, K, K, 1)
