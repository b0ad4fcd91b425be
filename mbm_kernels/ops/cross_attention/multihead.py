"""What torch.nn.MultiheadAttention asks beside attention: its masks, dropout and NaN."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_kernels._core import checks

MODULE = "nn.MultiheadAttention"
Inputs = tuple[Tensor, Tensor, Tensor]  # query, key, value
Masks = tuple[Tensor | None, Tensor | None]  # key_padding_mask, attn_mask
Flags = tuple[bool, bool, bool]  # need_weights, average_attn_weights, is_causal
Sizes = tuple[int, int, int, int]  # B, N, T, S


def merged(
    given: Masks,
    sizes: Sizes,
    appended: int,
    dtype: torch.dtype,
    batched: bool,
) -> Tensor | None:
    """Both masks as one of cross_attention's, which also admits the appended positions; `sizes`
    are B, N, T and S with these."""
    key_padding_mask, attn_mask = given
    batch, heads, steps, positions = sizes
    source = positions - appended
    masks = []
    if attn_mask is not None:
        checks.tensor(MODULE, "attn_mask", attn_mask, (2, 3))
        if attn_mask.dim() == 2:
            checks.shape(MODULE, "attn_mask", attn_mask, "T, S", (steps, source))
            masks.append(attn_mask[None, None])
        else:
            each = (batch * heads, steps, source)
            checks.shape(MODULE, "attn_mask", attn_mask, "B * N, T, S", each)
            masks.append(attn_mask.reshape(batch, heads, steps, source))
    if key_padding_mask is not None:
        shape = (batch, source) if batched else (source,)
        checks.tensor(MODULE, "key_padding_mask", key_padding_mask, len(shape))
        letters = "B, S" if batched else "S"
        checks.shape(MODULE, "key_padding_mask", key_padding_mask, letters, shape)
        masks.append(key_padding_mask.reshape(batch, 1, 1, source))
    if not masks:
        return None
    for mask in masks:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            expected = "bool, True = masked, or a floating mask that is added"
            checks.fail(
                MODULE,
                "attn_mask or key_padding_mask",
                mask.dtype,
                expected,
                "convert it",
                TypeError,
            )
    if all(mask.dtype == torch.bool for mask in masks):
        hidden = masks[0] if len(masks) == 1 else masks[0] | masks[1]
        return F.pad(~hidden, (0, appended), value=True)
    added = [
        torch.zeros_like(m, dtype=dtype).masked_fill(m, -torch.inf)
        if m.dtype == torch.bool
        else m.to(dtype)
        for m in masks
    ]
    return F.pad(added[0] if len(added) == 1 else added[0] + added[1], (0, appended))


def unsqueezed(query: Tensor, key: Tensor, value: Tensor) -> Inputs:
    """A batch of one, with what is one tensor staying one."""
    key_is_query, value_is_key = key is query, value is key
    query = query[None]
    key = query if key_is_query else key[None]
    return query, key, key if value_is_key else value[None]


def with_dropout(
    heads: Sequence[Tensor], mask: Tensor | None, kind: str | None, p: float
) -> tuple[Tensor, Tensor | None]:
    """torch's attention of `cross_attention`'s arguments, with dropout on its weights."""
    query, key, value = heads
    if kind is None:
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p=p), None
    scores = query * query.size(-1) ** -0.5 @ key.transpose(-1, -2)
    if mask is not None:
        added = mask.dtype != torch.bool
        scores = scores + mask if added else scores.masked_fill(~mask, -torch.inf)
    weights = F.dropout(torch.softmax(scores, -1), p)
    return weights @ value, weights.mean(1) if kind == "mean" else weights


def nan_where_nothing(context: Tensor, weights: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    hidden = ~mask if mask.dtype == torch.bool else mask == -torch.inf
    nothing = hidden.all(-1, keepdim=True)  # [B or 1, N or 1, T or 1, 1]
    context = context.masked_fill(nothing, torch.nan)
    return context, weights.masked_fill(
        nothing.any(1) if weights.dim() == 3 else nothing, torch.nan
    )
