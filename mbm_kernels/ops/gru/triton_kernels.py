"""Triton kernels of a GRU over a sequence; maths in README.md, barrier in NOTES.md.

`rows_*`: a program holds all weights and takes some rows through all steps. `grid_*`: the programs
of a group share the units of some rows and meet at a barrier in each step.
"""

import triton
import triton.language as tl

from mbm_kernels._core import triton_math
from mbm_kernels._core.triton_math import dot, load_tile, rounded, store_tile
from mbm_kernels.ops.gru_cell.triton_kernels import (
    add_dots,
    load_biases,
    load_gates,
    load_reserve,
    step,
    step_back,
    store_gradients,
    store_reserve,
)


@triton.jit
def row_lengths(lengths, b, B, T):
    """Of rows b, 0 past the last; and the longest of them."""
    length = tl.where(b < B, T, 0)
    longest = T
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + b, b < B, 0), 0), T).to(tl.int32)
        longest = tl.max(length, 0)
    return length, longest


@triton.jit
def meet(counter, target):
    """Returns when every program of the group has come here: the counter is at least target.

    What any of them stored before is visible to all of them after.
    """
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")
    seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    while seen < target:
        seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def load_inputs(inputs, b, u, t, B, H):
    """W_ih x + b_ih of step t, gate by gate."""
    at = inputs + tl.cast(t, tl.int64) * B * 3 * H
    r, z, n = load_gates(at, b, u, B, H, 3 * H, 1, H)
    return r.to(tl.float32), z.to(tl.float32), n.to(tl.float32)


@triton.jit
def advance(
    input_r, input_z, input_n, y, reserve, state_r, state_z, state_n, h, active, b, u, t, B, H
):
    """Ends step t of rows b and units u, given W_hh h + b_hh; returns the state after it."""
    row = tl.cast(t, tl.int64) * B
    r, z, n, after = step(input_r, input_z, input_n, state_r, state_z, state_n, h)
    store_tile(y + row * H, tl.where(active, after, 0.0), b, u, B, H, H, 1)
    if reserve is not None:
        store_reserve(reserve + row * 4 * H, r, z, n, state_n, b, u, B, H)
    return tl.where(active, after, h)


@triton.jit
def retreat(
    grad_y, y, h0, reserve, out, carried, active, length, b, u, t, B, H,
    grad_y_t, grad_y_b, grad_y_h, h0_b, h0_h,
    REVERSE: tl.constexpr,
):
    """Gradients of step t, stored in `out`: those from the state, and what passes by W_hh."""
    row = tl.cast(t, tl.int64) * B
    g = carried
    if grad_y is not None:
        at = grad_y + tl.cast(t, tl.int64) * grad_y_t
        g += load_tile(at, b, u, B, H, grad_y_b, grad_y_h).to(tl.float32)
    if REVERSE:
        first = t == length - 1
        before_row = row + B
    else:
        first = (t == 0) & (length >= 0)
        before_row = row - B
    earlier = tl.where(first, 0, B)
    at = y + before_row * H + b.to(tl.int64)[:, None] * H + u[None, :]
    h = tl.load(at, (active & (b < earlier)[:, None]) & (u < H)[None, :], 0.0).to(tl.float32)
    if h0 is not None:
        initial = load_tile(h0, b, u, B, H, h0_b, h0_h).to(tl.float32)
        h = tl.where(first[:, None], initial, h)
    r, z, n, a = load_reserve(reserve + row * 4 * H, b, u, B, H)
    by_r, by_z, by_n = step_back(g, r, z, n, a, h)
    by_r = tl.where(active, by_r, 0.0)
    by_z = tl.where(active, by_z, 0.0)
    by_n = tl.where(active, by_n, 0.0)
    from_n = tl.where(active, r * by_n, 0.0)
    store_gradients(out + row * 4 * H, by_r, by_z, by_n, from_n, b, u, B, H)
    return by_r, by_z, from_n, tl.where(active, g * z, carried)


@triton_math.launched
def rows_forward(
    inputs,  # [T, B, 3H]: W_ih x + b_ih
    w_hh,  # [3H, H]
    b_hh,  # [3H] or None
    h0,  # [B, H] or None
    lengths,  # int64 [B] or None
    y,  # [T, B, H]; zeros where there are lengths
    h_n,  # [B, H]
    reserve,  # [T, B, 4H] or None; zeros where there are lengths
    T, B, H, w_hh_g, w_hh_h, h0_b, h0_h,
    REVERSE: tl.constexpr, TF32: tl.constexpr, UNITS: tl.constexpr, BLOCK_B: tl.constexpr,
):
    """BLOCK_B rows, all units, all steps; UNITS >= H."""
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    u = tl.arange(0, UNITS)
    length, longest = row_lengths(lengths, b, B, T)
    w_r, w_z, w_n = load_gates(w_hh, u, u, H, H, w_hh_h, w_hh_g, H * w_hh_g)
    bias_r, bias_z, bias_n = load_biases(b_hh, u, H, UNITS)
    h = tl.zeros((BLOCK_B, UNITS), tl.float32)
    if h0 is not None:
        h = load_tile(h0, b, u, B, H, h0_b, h0_h).to(tl.float32)
    for i in range(longest):
        t = i
        if REVERSE:
            t = longest - 1 - i
        input_r, input_z, input_n = load_inputs(inputs, b, u, t, B, H)
        zero = tl.zeros((BLOCK_B, UNITS), tl.float32)
        state_r, state_z, state_n = add_dots(h, w_r, w_z, w_n, zero, zero, zero, TF32)
        active = (t < length)[:, None]
        h = advance(
            input_r, input_z, input_n, y, reserve, state_r + bias_r, state_z + bias_z,
            state_n + bias_n, h, active, b, u, t, B, H,
        )
    store_tile(h_n, h, b, u, B, H, H, 1)


@triton_math.launched
def rows_backward(
    grad_y,  # strides of [T, B, H], or None
    y, h0, reserve, w_hh, lengths,
    carried,  # float32 [B, H]: gradient of h_n in, of h0 out
    out,  # [T, B, 4H], see store_gradients; zeros where there are lengths
    T, B, H, w_hh_g, w_hh_h, h0_b, h0_h, grad_y_t, grad_y_b, grad_y_h,
    REVERSE: tl.constexpr, TF32: tl.constexpr, UNITS: tl.constexpr, BLOCK_B: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    u = tl.arange(0, UNITS)
    length, longest = row_lengths(lengths, b, B, T)
    w_r, w_z, w_n = load_gates(w_hh, u, u, H, H, w_hh_g, w_hh_h, H * w_hh_g)
    g = load_tile(carried, b, u, B, H, H, 1)
    for i in range(longest):
        t = longest - 1 - i
        if REVERSE:
            t = i
        active = (t < length)[:, None]
        by_r, by_z, from_n, g = retreat(
            grad_y, y, h0, reserve, out, g, active, length, b, u, t, B, H,
            grad_y_t, grad_y_b, grad_y_h, h0_b, h0_h, REVERSE,
        )
        g = dot(rounded(by_r, w_r.dtype), w_r, g, TF32)
        g = dot(rounded(by_z, w_r.dtype), w_z, g, TF32)
        g = dot(rounded(from_n, w_r.dtype), w_n, g, TF32)
    store_tile(carried, g, b, u, B, H, H, 1)


@triton.jit
def load_shared(x, i, j, rows, columns, stride_i):
    """x[i, j] past the first-level cache: other programs have just written it."""
    at = x + i.to(tl.int64)[:, None] * stride_i + j[None, :]
    use = (i < rows)[:, None] & (j < columns)[None, :]
    return tl.load(at, use, 0.0, cache_modifier=".cg")


@triton.jit
def slices(UNITS: tl.constexpr, PARTS: tl.constexpr):
    """0 .. UNITS - 1 as [PARTS, UNITS / PARTS]."""
    LENGTH: tl.constexpr = UNITS // PARTS
    return tl.arange(0, PARTS)[:, None] * LENGTH + tl.arange(0, LENGTH)[None, :]


@triton.jit
def load_slices(x, i, k, rows, columns, stride_i):
    """x[i, k] as [parts, i, k of the part], past the first-level cache."""
    at = x + i.to(tl.int64)[None, :, None] * stride_i + k[:, None, :]
    use = (i < rows)[None, :, None] & (k < columns)[:, None, :]
    return tl.load(at, use, 0.0, cache_modifier=".cg")


@triton.jit
def load_weights(w, k, u, H, stride_k, stride_u):
    """w[k, u] as [parts, k of the part, u]."""
    at = w + k.to(tl.int64)[:, :, None] * stride_k + u[None, None, :] * stride_u
    return tl.load(at, (k < H)[:, :, None] & (u < H)[None, None, :], 0.0)


@triton.jit
def sum_parts(part, PARTS: tl.constexpr):
    """The sum over the first dimension; each element's parts meet in one thread.

    tl.sum would leave the result in the layout of the products, each element in 8 threads.
    """
    tl.static_assert(PARTS == 8)
    ROWS: tl.constexpr = part.shape[1]
    UNITS: tl.constexpr = part.shape[2]
    a, b = tl.split(tl.reshape(tl.permute(part, (1, 2, 0)), (ROWS, UNITS, 4, 2)))
    a, b = tl.split(tl.reshape(a + b, (ROWS, UNITS, 2, 2)))
    a, b = tl.split(a + b)
    return a + b


@triton_math.launched
def grid_forward(
    inputs, w_hh, b_hh, lengths, y, h_n, reserve,
    states,  # [2, B, H]: h0 in the first; steps read one and write the other
    exact,  # float32 [B, H]: the states that `states` rounds, a program's own units only; or None
    counters,  # int32 [groups, 32], zeros
    T, B, H, w_hh_g, w_hh_h,
    REVERSE: tl.constexpr, TF32: tl.constexpr, UNITS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):
    """Program (p, group): blocks of BLOCK_U units p, p + programs, ... of blocks of rows.

    PARTS > 0: one block of units each, whose weights stay in registers. The depth UNITS >= H of the
    product is cut into PARTS, one a warp, so that each weight lies in one thread.
    """
    programs, groups = tl.num_programs(0), tl.num_programs(1)
    first_u = tl.program_id(0) * BLOCK_U
    counter = counters + tl.program_id(1) * 32
    target = 0
    if PARTS > 0:
        k = slices(UNITS, PARTS)
        u = first_u + tl.arange(0, BLOCK_U)
        kept_r = load_weights(w_hh, k, u, H, w_hh_h, w_hh_g)
        kept_z = load_weights(w_hh + H * w_hh_g, k, u, H, w_hh_h, w_hh_g)
        kept_n = load_weights(w_hh + 2 * H * w_hh_g, k, u, H, w_hh_h, w_hh_g)
        bias_r, bias_z, bias_n = load_biases(b_hh, u, H, BLOCK_U)
    for b0 in range(tl.program_id(1) * BLOCK_B, B, groups * BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        length, longest = row_lengths(lengths, b, B, T)
        for i in range(longest):
            t = i
            if REVERSE:
                t = longest - 1 - i
            active = (t < length)[:, None]
            now = states + tl.cast(i % 2, tl.int64) * B * H
            then = states + tl.cast(1 - i % 2, tl.int64) * B * H
            for u0 in range(first_u, H, programs * BLOCK_U):
                u = u0 + tl.arange(0, BLOCK_U)
                if exact is None:
                    own = load_shared(now, b, u, B, H, H)
                else:
                    own = load_tile(exact, b, u, B, H, H, 1)
                input_r, input_z, input_n = load_inputs(inputs, b, u, t, B, H)
                if PARTS == 0:
                    bias_r, bias_z, bias_n = load_biases(b_hh, u, H, BLOCK_U)
                state_r = tl.zeros((BLOCK_B, BLOCK_U), tl.float32)
                state_z = tl.zeros((BLOCK_B, BLOCK_U), tl.float32)
                state_n = tl.zeros((BLOCK_B, BLOCK_U), tl.float32)
                if PARTS > 0:
                    h = load_slices(now, b, k, B, H, H)
                    zero = tl.zeros((PARTS, BLOCK_B, BLOCK_U), tl.float32)
                    part_r, part_z, part_n = add_dots(
                        h, kept_r, kept_z, kept_n, zero, zero, zero, TF32
                    )
                    state_r = sum_parts(part_r, PARTS)
                    state_z = sum_parts(part_z, PARTS)
                    state_n = sum_parts(part_n, PARTS)
                else:
                    for k0 in range(0, H, BLOCK_K):
                        k1 = k0 + tl.arange(0, BLOCK_K)
                        h = load_shared(now, b, k1, B, H, H)
                        w_r, w_z, w_n = load_gates(
                            w_hh, k1, u, H, H, w_hh_h, w_hh_g, H * w_hh_g
                        )
                        state_r, state_z, state_n = add_dots(
                            h, w_r, w_z, w_n, state_r, state_z, state_n, TF32
                        )
                after = advance(
                    input_r, input_z, input_n, y, reserve, state_r + bias_r, state_z + bias_z,
                    state_n + bias_n, own, active, b, u, t, B, H,
                )
                store_tile(then, after, b, u, B, H, H, 1)
                if exact is not None:
                    store_tile(exact, after, b, u, B, H, H, 1)
            target += programs
            meet(counter, target)
        last = states + tl.cast(longest % 2, tl.int64) * B * H
        for u0 in range(first_u, H, programs * BLOCK_U):
            u = u0 + tl.arange(0, BLOCK_U)
            if exact is None:
                own = load_shared(last, b, u, B, H, H)
            else:
                own = load_tile(exact, b, u, B, H, H, 1)
            store_tile(h_n, own, b, u, B, H, H, 1)


@triton_math.launched
def grid_backward(
    grad_y, y, h0, reserve, w_hh, lengths,
    carried,  # float32 [B, H]: gradient of h_n in, of h0 out; a program's own units only
    out,  # [T, B, 4H], see store_gradients; zeros where there are lengths
    counters,
    T, B, H, w_hh_g, w_hh_h, h0_b, h0_h, grad_y_t, grad_y_b, grad_y_h,
    REVERSE: tl.constexpr, TF32: tl.constexpr, UNITS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):
    """As grid_forward; all units' gradients of the gates are read after each step's barrier."""
    programs, groups = tl.num_programs(0), tl.num_programs(1)
    first_u = tl.program_id(0) * BLOCK_U
    counter = counters + tl.program_id(1) * 32
    target = 0
    if PARTS > 0:
        k = slices(UNITS, PARTS)
        u = first_u + tl.arange(0, BLOCK_U)
        kept_r = load_weights(w_hh, k, u, H, w_hh_g, w_hh_h)
        kept_z = load_weights(w_hh + H * w_hh_g, k, u, H, w_hh_g, w_hh_h)
        kept_n = load_weights(w_hh + 2 * H * w_hh_g, k, u, H, w_hh_g, w_hh_h)
    for b0 in range(tl.program_id(1) * BLOCK_B, B, groups * BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        length, longest = row_lengths(lengths, b, B, T)
        for i in range(longest):
            t = longest - 1 - i
            if REVERSE:
                t = i
            active = (t < length)[:, None]
            for u0 in range(first_u, H, programs * BLOCK_U):
                u = u0 + tl.arange(0, BLOCK_U)
                g = load_tile(carried, b, u, B, H, H, 1)
                _, _, _, g = retreat(
                    grad_y, y, h0, reserve, out, g, active, length, b, u, t, B, H,
                    grad_y_t, grad_y_b, grad_y_h, h0_b, h0_h, REVERSE,
                )
                store_tile(carried, g, b, u, B, H, H, 1)
            target += programs
            meet(counter, target)
            given = out + tl.cast(t, tl.int64) * B * 4 * H + H
            for u0 in range(first_u, H, programs * BLOCK_U):
                u = u0 + tl.arange(0, BLOCK_U)
                g = load_tile(carried, b, u, B, H, H, 1)
                if PARTS > 0:
                    part = tl.zeros((PARTS, BLOCK_B, BLOCK_U), tl.float32)
                    part = dot(load_slices(given, b, k, B, H, 4 * H), kept_r, part, TF32)
                    part = dot(load_slices(given + H, b, k, B, H, 4 * H), kept_z, part, TF32)
                    part = dot(load_slices(given + 2 * H, b, k, B, H, 4 * H), kept_n, part, TF32)
                    g += sum_parts(part, PARTS)
                else:
                    for k0 in range(0, H, BLOCK_K):
                        k1 = k0 + tl.arange(0, BLOCK_K)
                        w_r, w_z, w_n = load_gates(
                            w_hh, k1, u, H, H, w_hh_g, w_hh_h, H * w_hh_g
                        )
                        g = dot(load_shared(given, b, k1, B, H, 4 * H), w_r, g, TF32)
                        g = dot(load_shared(given + H, b, k1, B, H, 4 * H), w_z, g, TF32)
                        g = dot(load_shared(given + 2 * H, b, k1, B, H, 4 * H), w_n, g, TF32)
                store_tile(carried, g, b, u, B, H, H, 1)
            tl.debug_barrier()
