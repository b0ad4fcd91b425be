"""torch.nn.MultiheadAttention with a backend."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbm_kernels._core import checks, dispatch, tracing
from mbm_kernels._core.drop_in import DropIn
from mbm_kernels._core.errors import BackendUnavailableError
from mbm_kernels.ops.concat_linear.op import linear
from mbm_kernels.ops.cross_attention.op import cross_attention

MODULE = "nn.MultiheadAttention"


class MultiheadAttention(DropIn, nn.MultiheadAttention):
    """torch.nn.MultiheadAttention: the same constructor, state_dict and masks, and `backend`.

    As in torch a mask's True hides a position, and where weights are asked for a row with nothing
    to attend to is NaN (its gradients are NaN in torch and 0 here). A row that a float mask fills
    with a large finite number, left padding of -1e9 say, has the outputs and gradients of torch's
    explicit softmax, weights or none (torch's fused form has other gradients). The projections take
    `concat_linear`'s kernel where its table says that it wins, unless `backend` is "torch".

    torch's own forward runs instead, with its results, where
    - dropout is active (training with dropout > 0),
    - the inputs are nested tensors,
    - torch has a fused path: self-attention in eval mode without gradients,
    - `is_causal` is given without `attn_mask`, so that torch raises its error.
    A backend named other than "auto" or "torch" raises BackendUnavailableError in these cases,
    except in self-attention without gradients, which it can run.
    """

    def __init__(self, *args: Any, backend: str = "auto", **kwargs: Any):
        dispatch.check_backend("nn.MultiheadAttention", backend)
        super().__init__(*args, **kwargs)
        self.backend = backend

    @tracing.leaf
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments and returns as torch.nn.MultiheadAttention.forward."""
        named = self.backend not in ("auto", "torch")
        reason = self._why_torch(query, key, value, attn_mask, is_causal, named)
        if reason is not None:
            if named:
                raise BackendUnavailableError(
                    f"{MODULE}: backend {self.backend!r} cannot run: {reason};"
                    " use backend='auto' or 'torch'"
                )
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        batched = query.dim() == 3
        # Sequences stay in the caller's order, [B, L, E] or [L, B, E]: projecting needs no copy.
        batch_first = self.batch_first or not batched
        if not batched:
            query, key, value = _unsqueeze(query, key, value)
        self._check(query, key, value, batch_first)
        heads = [self._split(x, batch_first) for x in self._project(query, key, value, batch_first)]
        mask = self._merge(key_padding_mask, attn_mask, heads[0], heads[1].size(2), batched)
        kind = ("mean" if average_attn_weights else "heads") if need_weights else None
        result = cross_attention(*heads, mask=mask, need_weights=kind, backend=self.backend)
        context, weights = result if isinstance(result, tuple) else (result, None)
        if weights is not None and mask is not None:
            context, weights = _nan_where_nothing(context, weights, mask)
        order = (0, 2, 1, 3) if batch_first else (2, 0, 1, 3)
        output = self._linear(
            context.permute(order).flatten(2), self.out_proj.weight, self.out_proj.bias
        )
        if not batched:
            return output[0], None if weights is None else weights[0]
        return output, weights

    def _why_torch(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        named: bool,
    ) -> str | None:
        if self.training and self.dropout > 0:
            return "dropout on the weights is torch's only"
        if query.is_nested or key.is_nested or value.is_nested:
            return "nested tensors are torch's only"
        if is_causal and attn_mask is None:
            return "is_causal needs attn_mask"
        fused = not (named or self.training or torch.is_grad_enabled())
        if fused and query is key and key is value:
            return "torch has a fused path for self-attention without gradients"
        return None

    def _check(self, query: Tensor, key: Tensor, value: Tensor, batch_first: bool) -> None:
        for name, x in (("query", query), ("key", key), ("value", value)):
            checks.tensor(MODULE, name, x, 3)
        axis = 0 if batch_first else 1
        batch, positions = query.size(axis), key.size(1 - axis)
        leading = (batch, positions) if batch_first else (positions, batch)
        letters = "B, S" if batch_first else "S, B"
        checks.shape(MODULE, "query", query, "..., embed_dim", (*query.shape[:2], self.embed_dim))
        checks.shape(MODULE, "key", key, f"{letters}, kdim", (*leading, self.kdim))
        checks.shape(MODULE, "value", value, f"{letters}, vdim", (*leading, self.vdim))

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, batch_first: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Projected query, key and value; the last two with what bias_k and zeros append."""
        size, bias = self.embed_dim, self.in_proj_bias
        if self._qkv_same_embed_dim and query is key and key is value:
            q, k, v = self._linear(query, self.in_proj_weight, bias).chunk(3, -1)
        elif self._qkv_same_embed_dim and key is value:
            biases = (None, None) if bias is None else torch.split(bias, [size, 2 * size])
            q_weight, kv_weight = torch.split(self.in_proj_weight, [size, 2 * size])
            q = self._linear(query, q_weight, biases[0])
            k, v = self._linear(key, kv_weight, biases[1]).chunk(2, -1)
        else:
            if self._qkv_same_embed_dim:
                weights = self.in_proj_weight.chunk(3)
            else:
                weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            thirds = (None, None, None) if bias is None else bias.chunk(3)
            triples = zip((query, key, value), weights, thirds, strict=True)
            q, k, v = (self._linear(x, w, b) for x, w, b in triples)
        axis = 1 if batch_first else 0
        one = [k.size(0), 1, size] if batch_first else [1, k.size(1), size]
        keys, values = [k], [v]
        if self.bias_k is not None and self.bias_v is not None:
            keys.append(self.bias_k.to(k.dtype).expand(one))
            values.append(self.bias_v.to(v.dtype).expand(one))
        if self.add_zero_attn:
            keys.append(k.new_zeros(one))
            values.append(v.new_zeros(one))
        if len(keys) > 1:
            k, v = torch.cat(keys, axis), torch.cat(values, axis)
        return q, k, v

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        project = F.linear if self.backend == "torch" else linear
        return project(x, weight, bias)

    def _split(self, x: Tensor, batch_first: bool) -> Tensor:
        """[B, L, E] or [L, B, E] to [B, N, L, E / N]."""
        x = x.reshape(*x.shape[:2], self.num_heads, self.head_dim)
        return x.permute((0, 2, 1, 3) if batch_first else (1, 2, 0, 3))

    def _merge(
        self,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        query: Tensor,
        positions: int,
        batched: bool,
    ) -> Tensor | None:
        """Both masks as one of cross_attention's, which also admits the appended positions."""
        batch, heads, steps, _ = query.shape
        appended = int(self.bias_k is not None) + int(self.add_zero_attn)
        source = positions - appended
        masks = []
        if attn_mask is not None:
            checks.tensor(MODULE, "attn_mask", attn_mask, (2, 3))
            if attn_mask.dim() == 2:
                checks.shape(MODULE, "attn_mask", attn_mask, "T, S", (steps, source))
                masks.append(attn_mask[None, None])
            else:
                sizes = (batch * heads, steps, source)
                checks.shape(MODULE, "attn_mask", attn_mask, "B * N, T, S", sizes)
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
            torch.zeros_like(m, dtype=query.dtype).masked_fill(m, -torch.inf)
            if m.dtype == torch.bool
            else m.to(query.dtype)
            for m in masks
        ]
        return F.pad(added[0] if len(added) == 1 else added[0] + added[1], (0, appended))

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"


def _unsqueeze(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of one, with what is one tensor staying one."""
    key_is_query, value_is_key = key is query, value is key
    query = query[None]
    key = query if key_is_query else key[None]
    return query, key, key if value_is_key else value[None]


def _nan_where_nothing(context: Tensor, weights: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    hidden = ~mask if mask.dtype == torch.bool else mask == -torch.inf
    nothing = hidden.all(-1, keepdim=True)  # [B or 1, N or 1, T or 1, 1]
    context = context.masked_fill(nothing, torch.nan)
    return context, weights.masked_fill(
        nothing.any(1) if weights.dim() == 3 else nothing, torch.nan
    )
