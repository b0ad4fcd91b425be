"""Triton kernels of one GRU step, and the step itself, which gru shares; the maths is in README.md.

Three gates r, z, n stand one after another in weights, biases and products, H units each.
"""

import triton
import triton.language as tl

from mbm_kernels._core import triton_math
from mbm_kernels._core.triton_math import dot, load_tile, rounded, store_tile


@triton.jit
def load_gates(x, i, j, rows, columns, stride_i, stride_j, gate):
    """Tiles [i, j] of the three gates, `gate` elements apart."""
    r = load_tile(x, i, j, rows, columns, stride_i, stride_j)
    z = load_tile(x + gate, i, j, rows, columns, stride_i, stride_j)
    n = load_tile(x + 2 * gate, i, j, rows, columns, stride_i, stride_j)
    return r, z, n


@triton.jit
def add_dots(x, w_r, w_z, w_n, by_r, by_z, by_n, TF32: tl.constexpr):
    """Each sum plus x times the gate's weights, x rounded to their type."""
    if x.dtype == tl.float32:
        x = rounded(x, w_r.dtype)
    return dot(x, w_r, by_r, TF32), dot(x, w_z, by_z, TF32), dot(x, w_n, by_n, TF32)


@triton.jit
def load_biases(bias, u, H, UNITS: tl.constexpr):
    """Of the three gates, [1, UNITS] each; zeros without any."""
    r = tl.zeros((1, UNITS), tl.float32)
    z = r
    n = r
    if bias is not None:
        r = tl.load(bias + u, u < H, 0.0).to(tl.float32)[None, :]
        z = tl.load(bias + H + u, u < H, 0.0).to(tl.float32)[None, :]
        n = tl.load(bias + 2 * H + u, u < H, 0.0).to(tl.float32)[None, :]
    return r, z, n


@triton.jit
def add_biases(bias, u, H, by_r, by_z, by_n):
    if bias is not None:
        r, z, n = load_biases(bias, u, H, by_r.shape[1])
        by_r += r
        by_z += z
        by_n += n
    return by_r, by_z, by_n


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def step(input_r, input_z, input_n, state_r, state_z, state_n, h):
    """r, z, n and the state after h, of W_ih x + b_ih and W_hh h + b_hh gate by gate."""
    r = sigmoid(input_r + state_r)
    z = sigmoid(input_z + state_z)
    n = triton_math.tanh(input_n + r * state_n)
    return r, z, n, n + z * (h - n)


@triton.jit
def step_back(g, r, z, n, a, h):
    """Gradients of the sums in r, z and n, given that of the state after h."""
    by_n = g * (1.0 - z) * (1.0 - n * n)
    by_z = g * (h - n) * z * (1.0 - z)
    by_r = by_n * a * r * (1.0 - r)
    return by_r, by_z, by_n


@triton.jit
def store_reserve(reserve, r, z, n, a, i, u, rows, H):
    """reserve [rows, 4H]."""
    store_tile(reserve, r, i, u, rows, H, 4 * H, 1)
    store_tile(reserve + H, z, i, u, rows, H, 4 * H, 1)
    store_tile(reserve + 2 * H, n, i, u, rows, H, 4 * H, 1)
    store_tile(reserve + 3 * H, a, i, u, rows, H, 4 * H, 1)


@triton.jit
def load_reserve(reserve, i, u, rows, H):
    r, z, n = load_gates(reserve, i, u, rows, H, 4 * H, 1, H)
    a = load_tile(reserve + 3 * H, i, u, rows, H, 4 * H, 1)
    return r.to(tl.float32), z.to(tl.float32), n.to(tl.float32), a.to(tl.float32)


@triton.jit
def store_gradients(out, by_r, by_z, by_n, from_n, i, u, rows, H):
    """out [rows, 4H]: n, r, z, then n as the state's product gets it, so that both [n, r, z], for
    the inputs, and [r, z, r n], for the state, are 3H columns side by side."""
    store_tile(out, by_n, i, u, rows, H, 4 * H, 1)
    store_tile(out + H, by_r, i, u, rows, H, 4 * H, 1)
    store_tile(out + 2 * H, by_z, i, u, rows, H, 4 * H, 1)
    store_tile(out + 3 * H, from_n, i, u, rows, H, 4 * H, 1)


@triton_math.launched
def cell(
    x,  # [B, C]
    h,  # [B, H]
    w_ih,  # [3H, C]
    w_hh,  # [3H, H]
    b_ih, b_hh,  # [3H] or None
    h_new,  # [B, H]
    reserve,  # [B, 4H] or None
    B, C, H, x_b, x_c, h_b, h_h, w_ih_g, w_ih_c, w_hh_g, w_hh_h,
    TF32: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """BLOCK_B rows, BLOCK_U units: both products and the gates."""
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    u = tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)
    sum_r = tl.zeros((BLOCK_B, BLOCK_U), tl.float32)
    sum_z = tl.zeros((BLOCK_B, BLOCK_U), tl.float32)
    input_n = tl.zeros((BLOCK_B, BLOCK_U), tl.float32)
    state_n = tl.zeros((BLOCK_B, BLOCK_U), tl.float32)
    for k0 in range(0, C, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        part = load_tile(x, b, k, B, C, x_b, x_c)
        w_r, w_z, w_n = load_gates(w_ih, k, u, C, H, w_ih_c, w_ih_g, H * w_ih_g)
        sum_r, sum_z, input_n = add_dots(part, w_r, w_z, w_n, sum_r, sum_z, input_n, TF32)
    for k0 in range(0, H, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        part = load_tile(h, b, k, B, H, h_b, h_h)
        w_r, w_z, w_n = load_gates(w_hh, k, u, H, H, w_hh_h, w_hh_g, H * w_hh_g)
        sum_r, sum_z, state_n = add_dots(part, w_r, w_z, w_n, sum_r, sum_z, state_n, TF32)
    sum_r, sum_z, input_n = add_biases(b_ih, u, H, sum_r, sum_z, input_n)
    sum_r, sum_z, state_n = add_biases(b_hh, u, H, sum_r, sum_z, state_n)
    before = load_tile(h, b, u, B, H, h_b, h_h).to(tl.float32)
    r, z, n, after = step(sum_r, sum_z, input_n, 0.0, 0.0, state_n, before)
    store_tile(h_new, after, b, u, B, H, H, 1)
    if reserve is not None:
        store_reserve(reserve, r, z, n, state_n, b, u, B, H)


@triton_math.launched
def gates(
    inputs,  # [B, 3H]: W_ih x
    states,  # [B, 3H]: W_hh h
    h, b_ih, b_hh, h_new, reserve,
    B, H, h_b, h_h,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr,
):
    """The gates alone, where both products are made beforehand."""
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    u = tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)
    input_r, input_z, input_n = load_gates(inputs, b, u, B, H, 3 * H, 1, H)
    state_r, state_z, state_n = load_gates(states, b, u, B, H, 3 * H, 1, H)
    input_r, input_z, input_n = add_biases(
        b_ih, u, H, input_r.to(tl.float32), input_z.to(tl.float32), input_n.to(tl.float32)
    )
    state_r, state_z, state_n = add_biases(
        b_hh, u, H, state_r.to(tl.float32), state_z.to(tl.float32), state_n.to(tl.float32)
    )
    before = load_tile(h, b, u, B, H, h_b, h_h).to(tl.float32)
    r, z, n, after = step(input_r, input_z, input_n, state_r, state_z, state_n, before)
    store_tile(h_new, after, b, u, B, H, H, 1)
    if reserve is not None:
        store_reserve(reserve, r, z, n, state_n, b, u, B, H)


@triton_math.launched
def gate_gradients(
    grad_h_new,  # [B, H]
    h, reserve,
    out,  # [B, 4H], see store_gradients
    direct,  # [B, H]: the part of grad_h that does not pass W_hh, or None
    B, H, grad_b, grad_h, h_b, h_h,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    u = tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)
    g = load_tile(grad_h_new, b, u, B, H, grad_b, grad_h).to(tl.float32)
    before = load_tile(h, b, u, B, H, h_b, h_h).to(tl.float32)
    r, z, n, a = load_reserve(reserve, b, u, B, H)
    by_r, by_z, by_n = step_back(g, r, z, n, a, before)
    store_gradients(out, by_r, by_z, by_n, r * by_n, b, u, B, H)
    if direct is not None:
        store_tile(direct, g * z, b, u, B, H, H, 1)
