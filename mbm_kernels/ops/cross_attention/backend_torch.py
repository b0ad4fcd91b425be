"""The fastest PyTorch baseline: SDPA without weights, two products and a softmax with them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_kernels._core import masks
from mbm_kernels.ops.cross_attention.by_pairs import Hiding, by_pairs
from mbm_kernels.ops.cross_attention.problem import Problem

Inputs = tuple[Tensor, Tensor, Tensor]  # query, key, value

# Fused SDPA saves a log-sum-exp for each row, rounded as the scores are: in a row that an added
# mask moves by -1e9 the log of the sum is lost, and the backward's weights are up to S times too
# large. Up to this size of a row's largest addend 64 eps is all that is lost.
LARGEST_ADDED = 64.0


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return None


def fwd(
    p: Problem, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    key_lengths, mask, save = rest
    given, hiding = (query, key, value), _hiding(key_lengths, mask, key)
    if hiding is None:
        context, heads = _dense(p, given, None, p.need_weights is not None)
    else:
        looks = masks.readable((*given, *hiding))
        context, heads = (_looking if looks else _masked)(p, given, hiding, save)
    if heads is None:
        return context, None, None  # making empty tensors takes 2 us
    return context, heads.mean(1) if p.need_weights == "mean" else heads, None


def _masked(
    p: Problem, given: Inputs, hiding: Hiding, save: bool, exact: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Reads no value of a mask, so that it never waits for a device and can be traced."""
    given = masks.unread(*given, hiding.attend)
    exact = exact or p.need_weights is not None or (save and hiding.added is not None)
    context, heads = _dense(p, given, hiding, exact)
    return masks.constant_where_empty(context, hiding.attend, False) if save else context, heads


def _looking(p: Problem, given: Inputs, hiding: Hiding, save: bool) -> tuple[Tensor, Tensor | None]:
    """Chooses the form by what masks and inputs hold.

    A hidden NaN shows in the context, except that a gradient may meet one of a query or a key which
    the softmax has dropped.
    """
    attend, added = hiding
    exact = p.need_weights is not None
    exact = exact or (save and added is not None and not _keeps_sums(added))
    if not save or masks.all_finite(*given[:2]):
        context, heads = _dense(p, given, hiding, exact)
        if masks.all_finite(context):
            return masks.constant_where_empty(context, attend, True) if save else context, heads
    same_for_all = attend.size(-2) == 1
    if not same_for_all:
        clean = masks.unread(*given, attend)
        if not masks.all_finite(*clean[1:]):
            return by_pairs(p.scale, given, hiding, save)
    return _masked(p, given, hiding, save, exact)


def _keeps_sums(added: Tensor) -> bool:
    """Whether SDPA's backward finds the weights of its forward again."""
    if added.size(-1) == 0:
        return True
    top = added.detach().amax(-1)
    return bool(((top.abs() <= LARGEST_ADDED) | (top == -torch.inf)).all())


def _dense(
    p: Problem, given: Inputs, hiding: Hiding | None, explicit: bool
) -> tuple[Tensor, Tensor | None]:
    """Context and, where `explicit`, the weights of each head."""
    attend, added = (None, None) if hiding is None else hiding
    query, key, value = given
    if not explicit:
        # SDPA gives 0, and gradients of 0, for a row that is masked throughout.
        mask = attend if added is None else added
        return F.scaled_dot_product_attention(query, key, value, mask, scale=p.scale), None
    scores = _scores(query, key, p.scale)
    if added is not None:
        scores = scores + added
    weights = torch.softmax(scores, -1) if attend is None else masks.softmax(scores, attend)
    return weights @ value, weights


def _hiding(key_lengths: Tensor | None, mask: Tensor | None, key: Tensor) -> Hiding | None:
    """Both masks as one, four-dimensional; None where nothing is hidden or added."""
    if key_lengths is None and mask is None:
        return None
    inside = masks.attend_mask(None, key_lengths, key.size(2), key.device)
    inside = None if inside is None else inside[:, None]
    if mask is None:
        assert inside is not None
        return Hiding(inside, None)
    mask = mask.reshape(*(1,) * (4 - mask.dim()), *mask.shape)
    if mask.dtype == torch.bool:
        return Hiding(mask if inside is None else mask & inside, None)
    added = mask if inside is None else torch.where(inside, mask, -torch.inf)
    return Hiding(added != -torch.inf, added)


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """scale * query @ key^T, [B, N, T, S]; scaled in the accumulator, without a pass of its own."""
    batch, heads, steps, features = query.shape
    rows = query.reshape(batch * heads, steps, features)
    columns = key.reshape(batch * heads, key.size(2), features).transpose(1, 2)
    unused = query.new_zeros(1, 1, 1)
    products = torch.baddbmm(unused, rows, columns, beta=0, alpha=scale)
    return products.view(batch, heads, steps, key.size(2))
