"""Triton kernels of linear_distillation_loss; the maths is in README.md.

One program is one row of student logits x and teacher logits t. Its gradients, times `factor`, take
the place of x. log_p and log_q are the tempered log-probabilities of teacher and student.
"""

import triton
import triton.language as tl

from mbm_kernels._core import triton_math

FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JSD = tl.constexpr(2)
LEAST = tl.constexpr(-1e30)  # what minus infinity counts as
TINY = tl.constexpr(1.1754944e-38)
TAIL_FLOOR = tl.constexpr(2.0**-23)


@triton.jit
def finite(x):
    return tl.where(x < LEAST, LEAST, x)


@triton.jit
def load_logits(row, bias, v, inside, row_v, bias_v):
    """Biased; -infinity outside."""
    x = tl.load(row + v.to(tl.int64) * row_v, inside, -float("inf")).to(tl.float32)
    if bias is not None:
        x += finite(tl.load(bias + v * bias_v, inside, 0.0).to(tl.float32))
    return x


@triton.jit
def powers(d, inverse, POWER: tl.constexpr):
    """e^d and e^(d inverse) for d <= 0; by squaring where the temperature is POWER and not 0."""
    r = tl.exp(d * inverse)
    if POWER == 1:
        e = r
    elif POWER == 2:
        e = r * r
    elif POWER == 4:
        e = (r * r) * (r * r)
    else:
        e = tl.exp(d)
    return e, r


@triton.jit
def add_powers(largest, total, tempered, x, inverse, POWER: tl.constexpr):
    """triton_math.add_exp at temperature 1 and at 1 / inverse at once."""
    d = x - largest
    e, r = powers(-tl.abs(d), inverse, POWER)
    up = d > 0
    total = tl.where(up, total * e + 1.0, total + e)
    return tl.where(up, x, largest), total, tl.where(up, tempered * r + 1.0, tempered + r)


@triton.jit
def join_powers(largest, total, tempered, inverse, POWER: tl.constexpr):
    top = tl.max(largest, 0)
    e, r = powers(largest - top, inverse, POWER)
    return top, tl.sum(total * e, 0), tl.sum(tempered * r, 0)


@triton.jit
def compare(log_p, log_q, beta, DIVERGENCE: tl.constexpr):
    """A class's term of the divergence, and the log ratio r whose mean under q its slope needs."""
    if DIVERGENCE == FORWARD_KL:
        ratio = log_q - log_p
        term = tl.exp(log_p) * (log_p - log_q)
    elif DIVERGENCE == REVERSE_KL:
        ratio = log_q - log_p
        term = tl.exp(log_q) * ratio
    else:
        p = tl.exp(log_p)
        q = tl.exp(log_q)
        log_m = tl.log(tl.maximum(beta * p + (1.0 - beta) * q, TINY))
        ratio = log_q - log_m
        term = beta * (p * (log_p - log_m)) + (1.0 - beta) * (q * ratio)
    return term, ratio


@triton.jit
def soft_loss(divergence, square, valid):
    """Its rounding may be negative, its definition is not; NaN where the row is not valid."""
    return tl.where(valid, square * tl.where(divergence < 0, 0.0, divergence), float("nan"))


@triton.jit
def slope(log_p, log_q, ratio, mean, beta, DIVERGENCE: tl.constexpr):
    """The divergence's derivative by the tempered logit, x / T; `mean` is the sum of q r."""
    q = tl.exp(log_q)
    if DIVERGENCE == FORWARD_KL:
        found = q - tl.exp(log_p)
    elif DIVERGENCE == REVERSE_KL:
        found = q * (ratio - mean)
    else:
        found = (1.0 - beta) * (q * (ratio - mean))
    return found


@triton.jit
def share_of(share, n, share_n, factor, valid):
    found = factor
    if share is not None:
        found = factor * tl.load(share + n * share_n)
    return tl.where(valid, found, float("nan"))


@triton.jit
def ignored_row(hard_losses, soft_losses, gradients, n, V, gradients_n, BLOCK_V: tl.constexpr):
    if hard_losses is not None:
        tl.store(hard_losses + n, 0.0)
        tl.store(soft_losses + n, 0.0)
    if gradients is not None:
        zero = tl.zeros((BLOCK_V,), gradients.dtype.element_ty)
        for v0 in range(0, V, BLOCK_V):
            v = v0 + tl.arange(0, BLOCK_V)
            tl.store(gradients + n * gradients_n + v, zero, v < V)


@triton.jit
def rows(
    logits,  # float32 [N, V], the products alone
    bias,  # [V] or None
    teacher,  # [N, V], without teacher_bias
    teacher_bias,  # [V] or None
    target,  # int64 [N]
    hard_share, soft_share,  # float32, of each loss's gradient: [N], one number, or None for 1
    hard_losses, soft_losses,  # float32 [N] or None
    gradients,  # [N, V] of the logits, or None; may lie over `logits`, rows equally far apart
    V, ignore_index, inverse, square, beta, hard_factor, soft_factor, logits_n, teacher_n,
    teacher_v, gradients_n, bias_v, teacher_bias_v, target_n, share_n,
    DIVERGENCE: tl.constexpr, POWER: tl.constexpr, HARD: tl.constexpr, SOFT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A teacher over all classes. HARD and SOFT say of which losses there are gradients."""
    n = tl.program_id(0).to(tl.int64)
    y = tl.load(target + n * target_n)
    lanes = tl.arange(0, BLOCK_V)
    row = logits + n * logits_n
    row_t = teacher + n * teacher_n
    if y == ignore_index:
        ignored_row(hard_losses, soft_losses, gradients, n, V, gradients_n, BLOCK_V)
    else:
        # Nobody has looked at targets and ids: one that is no class makes NaN and is no address.
        valid = (y >= 0) & (y < V)
        chosen = tl.where(valid, load_logits(row, bias, y, valid, 1, bias_v), float("nan"))
        top = tl.full((BLOCK_V,), triton_math.LOWEST, tl.float32)
        total = tl.zeros((BLOCK_V,), tl.float32)
        tempered = tl.zeros((BLOCK_V,), tl.float32)
        top_t = tl.full((BLOCK_V,), triton_math.LOWEST, tl.float32)
        total_t = tl.zeros((BLOCK_V,), tl.float32)
        for v0 in range(0, V, BLOCK_V):
            v = v0 + lanes
            x = load_logits(row, bias, v, v < V, 1, bias_v)
            top, total, tempered = add_powers(top, total, tempered, x, inverse, POWER)
            t = finite(load_logits(row_t, teacher_bias, v, v < V, teacher_v, teacher_bias_v))
            t = tl.where(v < V, t * inverse, -float("inf"))
            top_t, total_t = triton_math.add_exp(top_t, total_t, t)
        top, total, tempered = join_powers(top, total, tempered, inverse, POWER)
        top_t, total_t = triton_math.join_exp(top_t, total_t)
        log_tempered = tl.log(tempered)
        log_t = tl.log(total_t)
        if hard_losses is not None:
            tl.store(hard_losses + n, tl.log(total) - (chosen - top))

        terms = tl.zeros((BLOCK_V,), tl.float32)
        mean = 0.0
        if (DIVERGENCE != FORWARD_KL) or (gradients is None):
            ratios = tl.zeros((BLOCK_V,), tl.float32)
            for v0 in range(0, V, BLOCK_V):
                v = v0 + lanes
                x = load_logits(row, bias, v, v < V, 1, bias_v)
                t = finite(load_logits(row_t, teacher_bias, v, v < V, teacher_v, teacher_bias_v))
                log_q = finite((x - top) * inverse - log_tempered)
                log_p = finite((t * inverse - top_t) - log_t)
                term, ratio = compare(log_p, log_q, beta, DIVERGENCE)
                terms += tl.where(v < V, term, 0.0)
                ratios += tl.where(v < V, tl.exp(log_q) * ratio, 0.0)
            mean = tl.sum(ratios, 0)

        if gradients is not None:
            by_hard = share_of(hard_share, n, share_n, hard_factor, valid)
            by_soft = share_of(soft_share, n, share_n, soft_factor, valid)
            # softmax at temperature 1 out of q, where the temperature is a power that is squared
            if POWER == 1:
                ratio_1 = tempered / total
            elif POWER == 2:
                ratio_1 = tempered * (tempered / total)
            else:
                ratio_1 = (tempered * tempered) * (tempered * (tempered / total))
            for v0 in range(0, V, BLOCK_V):
                v = v0 + lanes
                x = load_logits(row, bias, v, v < V, 1, bias_v)
                t = finite(load_logits(row_t, teacher_bias, v, v < V, teacher_v, teacher_bias_v))
                log_q = finite((x - top) * inverse - log_tempered)
                log_p = finite((t * inverse - top_t) - log_t)
                term, ratio = compare(log_p, log_q, beta, DIVERGENCE)
                if (DIVERGENCE == FORWARD_KL) and (hard_losses is not None):
                    terms += tl.where(v < V, term, 0.0)
                g = tl.zeros((BLOCK_V,), tl.float32)
                if HARD:
                    q = tl.exp(log_q)
                    if POWER == 0:
                        p_1 = tl.exp(x - top) / total
                    elif POWER == 1:
                        p_1 = q * ratio_1
                    elif POWER == 2:
                        p_1 = (q * q) * ratio_1
                    else:
                        p_1 = ((q * q) * ratio_1) * (q * q)
                    g += by_hard * (p_1 - tl.where(v == y, 1.0, 0.0))
                if SOFT:
                    g += by_soft * slope(log_p, log_q, ratio, mean, beta, DIVERGENCE)
                tl.debug_barrier()  # half precision lies over other logits
                tl.store(gradients + n * gradients_n + v, g.to(gradients.dtype.element_ty), v < V)
        if soft_losses is not None:
            tl.store(soft_losses + n, soft_loss(tl.sum(terms, 0), square, valid))


@triton.jit
def bins(
    logits,  # float32 [N, V], the products alone; the ids' are overwritten
    bias,  # [V] or None
    ids,  # int64 [N, K]
    log_probs,  # [N, K]
    picked,  # float32 [N, K], scratch: the ids' logits
    target,  # int64 [N]
    hard_share, soft_share, hard_losses, soft_losses, gradients,  # as of `rows`
    V, K, ignore_index, inverse, square, beta, hard_factor, soft_factor, logits_n, ids_n, ids_k,
    log_probs_n, log_probs_k, gradients_n, bias_v, target_n, share_n,
    REST: tl.constexpr, DIVERGENCE: tl.constexpr, POWER: tl.constexpr, HARD: tl.constexpr,
    SOFT: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """A teacher of K ids, and of all other classes together where REST, as one more bin.

    The ids' logits are set aside and replaced by -infinity, so that passes over V see the rest.
    """
    n = tl.program_id(0).to(tl.int64)
    y = tl.load(target + n * target_n)
    lanes = tl.arange(0, BLOCK_V)
    row = logits + n * logits_n
    if y == ignore_index:
        ignored_row(hard_losses, soft_losses, gradients, n, V, gradients_n, BLOCK_V)
    else:
        valid = (y >= 0) & (y < V)
        chosen = load_logits(row, bias, y, valid, 1, bias_v)
        mass = tl.zeros((BLOCK_K,), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            i = tl.load(ids + n * ids_n + k * ids_k, k < K, 0)
            known = (i >= 0) & (i < V)
            x = load_logits(row, bias, i, (k < K) & known, 1, bias_v)
            valid = valid & (tl.min(tl.where((k < K) & (known == 0), 0, 1), 0) > 0)
            tl.store(picked + n * K + k, x, k < K)
            a = tl.load(log_probs + n * log_probs_n + k * log_probs_k, k < K, -float("inf"))
            mass += tl.exp(a.to(tl.float32))
        chosen = tl.where(valid, chosen, float("nan"))
        tl.debug_barrier()
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            i = tl.load(ids + n * ids_n + k * ids_k, k < K, 0)
            hidden = tl.full((BLOCK_K,), -float("inf"), tl.float32)
            tl.store(row + i, hidden, (k < K) & (i >= 0) & (i < V))
        tl.debug_barrier()

        top_v = tl.full((BLOCK_V,), triton_math.LOWEST, tl.float32)
        total_v = tl.zeros((BLOCK_V,), tl.float32)
        for v0 in range(0, V, BLOCK_V):
            v = v0 + lanes
            x = load_logits(row, bias, v, v < V, 1, bias_v)
            top_v, total_v = triton_math.add_exp(top_v, total_v, x)
        top_v, total_v = triton_math.join_exp(top_v, total_v)

        # The rest is the first lane's first bin.
        bins_k = tl.arange(0, BLOCK_K)
        top = tl.full((BLOCK_K,), triton_math.LOWEST, tl.float32)
        total = tl.zeros((BLOCK_K,), tl.float32)
        top_t = tl.full((BLOCK_K,), triton_math.LOWEST, tl.float32)
        rest = triton_math.LOWEST
        tail = triton_math.LOWEST
        if REST:
            rest = top_v + tl.log(total_v)
            tail = tl.log(tl.maximum(1.0 - tl.sum(mass, 0), TAIL_FLOOR))
            top = tl.where(bins_k == 0, rest, top)
            top_t = tl.where(bins_k == 0, tail * inverse, top_t)
            total = tl.where(bins_k == 0, 1.0, 0.0)
        tempered = total
        total_t = total
        for k0 in range(0, K, BLOCK_K):
            k = k0 + bins_k
            x = tl.load(picked + n * K + k, k < K, -float("inf"))
            top, total, tempered = add_powers(top, total, tempered, x, inverse, POWER)
            a = load_tempered(log_probs, n, k, K, log_probs_n, log_probs_k, inverse)
            top_t, total_t = triton_math.add_exp(top_t, total_t, a)
        top, total, tempered = join_powers(top, total, tempered, inverse, POWER)
        top_t, total_t = triton_math.join_exp(top_t, total_t)
        log_tempered = tl.log(tempered)
        log_t = tl.log(total_t)
        if hard_losses is not None:
            tl.store(hard_losses + n, tl.log(total) - (chosen - top))

        terms = tl.zeros((BLOCK_K,), tl.float32)
        ratios = tl.zeros((BLOCK_K,), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + bins_k
            x = tl.load(picked + n * K + k, k < K, -float("inf"))
            a = load_tempered(log_probs, n, k, K, log_probs_n, log_probs_k, inverse)
            log_q = finite((x - top) * inverse - log_tempered)
            log_p = finite((a - top_t) - log_t)
            term, ratio = compare(log_p, log_q, beta, DIVERGENCE)
            terms += tl.where(k < K, term, 0.0)
            ratios += tl.where(k < K, tl.exp(log_q) * ratio, 0.0)
        soft = tl.sum(terms, 0)
        mean = tl.sum(ratios, 0)
        rest_q = finite((rest - top) * inverse - log_tempered)
        rest_p = finite((tail * inverse - top_t) - log_t)
        rest_term, rest_ratio = compare(rest_p, rest_q, beta, DIVERGENCE)
        if REST:
            soft += rest_term
            mean += tl.exp(rest_q) * rest_ratio
        if soft_losses is not None:
            tl.store(soft_losses + n, soft_loss(soft, square, valid))

        if gradients is not None:
            by_hard = share_of(hard_share, n, share_n, hard_factor, valid)
            by_soft = share_of(soft_share, n, share_n, soft_factor, valid)
            by_exp = tl.where(valid, 0.0, float("nan"))
            if REST:
                if HARD:
                    by_exp += by_hard * (tl.exp(top_v - top) / total)
                if SOFT:
                    by_rest = slope(rest_p, rest_q, rest_ratio, mean, beta, DIVERGENCE)
                    by_exp += by_soft * (by_rest / total_v)
            for v0 in range(0, V, BLOCK_V):
                v = v0 + lanes
                x = load_logits(row, bias, v, v < V, 1, bias_v)
                g = tl.exp(x - top_v) * by_exp
                if HARD:
                    g -= tl.where(v == y, by_hard, 0.0)
                tl.debug_barrier()  # half precision lies over other logits
                tl.store(gradients + n * gradients_n + v, g.to(gradients.dtype.element_ty), v < V)
            tl.debug_barrier()
            for k0 in range(0, K, BLOCK_K):
                k = k0 + bins_k
                x = tl.load(picked + n * K + k, k < K, -float("inf"))
                a = load_tempered(log_probs, n, k, K, log_probs_n, log_probs_k, inverse)
                i = tl.load(ids + n * ids_n + k * ids_k, k < K, -1)
                log_q = finite((x - top) * inverse - log_tempered)
                log_p = finite((a - top_t) - log_t)
                term, ratio = compare(log_p, log_q, beta, DIVERGENCE)
                g = tl.zeros((BLOCK_K,), tl.float32)
                if HARD:
                    g += by_hard * (tl.exp(x - top) / total - tl.where(i == y, 1.0, 0.0))
                if SOFT:
                    g += by_soft * slope(log_p, log_q, ratio, mean, beta, DIVERGENCE)
                to = gradients + n * gradients_n + i
                tl.store(to, g.to(gradients.dtype.element_ty), (k < K) & (i >= 0) & (i < V))


@triton.jit
def load_tempered(log_probs, n, k, K, log_probs_n, log_probs_k, inverse):
    a = tl.load(log_probs + n * log_probs_n + k * log_probs_k, k < K, 0.0).to(tl.float32)
    return tl.where(k < K, finite(a) * inverse, -float("inf"))
