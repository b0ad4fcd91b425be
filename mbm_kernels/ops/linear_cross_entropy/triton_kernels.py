"""The Triton kernel of linear_cross_entropy; the maths is in README.md."""

import triton
import triton.language as tl

from mbm_kernels._core import triton_math


@triton.jit
def load_uncapped(row, bias, v, inside, bias_v):
    """Biased; -infinity outside."""
    x = tl.load(row + v, inside, -float("inf"))
    if bias is not None:
        x += tl.load(bias + v * bias_v, inside, 0.0).to(tl.float32)
    return x


@triton.jit
def cap(x, inside, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        x = tl.where(inside, softcap * triton_math.tanh(x / softcap), -float("inf"))
    return x


@triton.jit
def load_logits(row, bias, v, inside, bias_v, softcap, CAPPED: tl.constexpr):
    """Biased and capped; -infinity outside."""
    return cap(load_uncapped(row, bias, v, inside, bias_v), inside, softcap, CAPPED)


@triton.jit
def rows(
    logits,  # float32 [N, V], the products alone
    bias,  # [V] or None
    target,  # int64 [N]
    share,  # float32, each row's share of the loss's gradient: [N], one number, or None for 1
    losses,  # float32 [N] or None
    gradients,  # [N, V] of the logits, or None; may lie over `logits`, rows equally far apart
    V, ignore_index, smoothing, softcap, z_loss, factor, logits_n, gradients_n, bias_v, target_n,
    share_n,
    CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, BLOCK_V: tl.constexpr,
):
    """One row: its statistics in one pass, then its gradients, times `factor`, in place."""
    n = tl.program_id(0).to(tl.int64)
    y = tl.load(target + n * target_n)
    lanes = tl.arange(0, BLOCK_V)
    row = logits + n * logits_n
    if y == ignore_index:
        if losses is not None:
            tl.store(losses + n, 0.0)
        if gradients is not None:
            zero = tl.zeros((BLOCK_V,), gradients.dtype.element_ty)
            for v0 in range(0, V, BLOCK_V):
                v = v0 + lanes
                tl.store(gradients + n * gradients_n + v, zero, v < V)
    else:
        # Nobody has looked at the targets: one that is no class makes NaN and reads nothing.
        valid = (y >= 0) & (y < V)
        chosen = load_logits(row, bias, y, valid, bias_v, softcap, CAPPED)
        chosen = tl.where(valid, chosen, float("nan"))
        largest = tl.full((BLOCK_V,), triton_math.LOWEST, tl.float32)
        total = tl.zeros((BLOCK_V,), tl.float32)
        plain = tl.zeros((BLOCK_V,), tl.float32)
        for v0 in range(0, V, BLOCK_V):
            v = v0 + lanes
            x = load_logits(row, bias, v, v < V, bias_v, softcap, CAPPED)
            largest, total = triton_math.add_exp(largest, total, x)
            if SMOOTHED:
                plain += tl.where(v < V, x, 0.0)
        top, total = triton_math.join_exp(largest, total)
        log_total = tl.log(total)
        lse = top + log_total
        if losses is not None:
            if SMOOTHED:
                mean = tl.sum(plain, 0) / V
                loss = log_total - (1.0 - smoothing) * (chosen - top) - smoothing * (mean - top)
            else:
                loss = log_total - (chosen - top)
            tl.store(losses + n, loss + z_loss * lse * lse)
        if gradients is not None:
            scale = factor
            if share is not None:
                scale = factor * tl.load(share + n * share_n)
            scale = tl.where(valid, scale, float("nan"))
            by_exp = (1.0 + 2.0 * z_loss * lse) / total
            for v0 in range(0, V, BLOCK_V):
                v = v0 + lanes
                u = load_uncapped(row, bias, v, v < V, bias_v)
                x = cap(u, v < V, softcap, CAPPED)
                g = tl.exp(x - top) * by_exp
                if SMOOTHED:
                    g = g - tl.where(v == y, 1.0 - smoothing, 0.0) - smoothing / V
                else:
                    g = g - tl.where(v == y, 1.0, 0.0)
                if CAPPED:
                    g *= triton_math.tanh_slope(u / softcap)
                tl.debug_barrier()  # half precision lies over other logits
                g = (g * scale).to(gradients.dtype.element_ty)
                tl.store(gradients + n * gradients_n + v, g, v < V)
