"""torch.nn.MultiheadAttention with a backend."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbm_kernels._core import checks, dispatch, tracing
from mbm_kernels._core.drop_in import DropIn
from mbm_kernels._core.errors import BackendUnavailableError
from mbm_kernels._core.stock import ServedByStock
from mbm_kernels.ops.concat_linear.op import linear, linear_choice
from mbm_kernels.ops.cross_attention.multihead import (
    MODULE,
    Flags,
    Inputs,
    Masks,
    Sizes,
    merged,
    nan_where_nothing,
    unsqueezed,
    with_dropout,
)
from mbm_kernels.ops.cross_attention.op import cross_attention
from mbm_kernels.ops.cross_attention.problem import NAME, sizes_of

DROPS = "dropout on the weights is torch's only"
_MARK = "mbm_kernels: a backend asked for by name"


def _marked(module: nn.Module, inputs: Any) -> None:
    """A hook that does nothing."""


class MultiheadAttention(DropIn, ServedByStock, nn.MultiheadAttention):
    """torch.nn.MultiheadAttention: the same constructor, state_dict and masks, and `backend`.

    As in torch a mask's True hides a position, and where weights are asked for a row with nothing
    to attend to is NaN (its gradients are NaN in torch and 0 here). A row that a float mask fills
    with a large finite number, left padding of -1e9 say, has the outputs and gradients of torch's
    explicit softmax, weights or none (torch's fused form has other gradients). The projections take
    `concat_linear`'s kernel where its table says that it wins, unless `backend` is "torch".

    torch's own forward runs instead, with its results, where
    - every part of it would run the torch backend, unless masks have gradients of their own kind,
    - the inputs are nested tensors,
    - torch has a fused path: self-attention in eval mode without gradients,
    - `is_causal` is given without `attn_mask`, so that torch raises its error.
    Where dropout is active (training with dropout > 0) the attention is torch's, with its random
    numbers, and the projections may be kernels'. A backend named other than "auto" or "torch"
    raises BackendUnavailableError in these cases, except in self-attention without gradients, which
    it can run; torch.nn.TransformerEncoderLayer's fused path leaves a module with such a backend
    alone, for a hook sits on it.
    """

    def __init__(self, *args: Any, backend: str = "auto", **kwargs: Any):
        dispatch.check_backend("nn.MultiheadAttention", backend)
        super().__init__(*args, **kwargs)
        self.backend = backend

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "backend":
            hooks: dict[Any, Any] = self._forward_pre_hooks
            hooks.pop(_MARK, None)
            if value not in ("auto", "torch"):
                hooks[_MARK] = _marked

    @tracing.leaf  # here, for torch.fx may call it with fewer arguments
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
        given, masks = (query, key, value), (key_padding_mask, attn_mask)
        flags = (need_weights, average_attn_weights, is_causal)
        known = None if torch.compiler.is_compiling() else self._stock_calls
        served = None if known is None else known.find(*self._known_by(given, masks, flags))
        if served is None:
            served = self._is_stock(given, masks, flags)
            if not any(x.is_nested for x in given):
                self._remember(*self._known_by(given, masks, flags), served)
        if served:
            return super().forward(*given, key_padding_mask, need_weights, attn_mask, *flags[1:])
        return self._attend(given, masks, flags)

    def _known_by(
        self, given: Inputs, masks: Masks, flags: Flags
    ) -> tuple[list[Any], tuple[Any, ...]]:
        """The tensors and options that a call is known by."""
        (query, key, value), (padding, mask) = given, masks
        tensors: list[Any] = [query]  # each once: guards refuse a tensor that comes twice
        if key is not query:
            tensors.append(key)
        if value is not key and value is not query:
            tensors.append(value)
        if padding is not None:
            tensors.append(padding)
        if mask is not None:
            tensors.append(mask)
        same = (key is query, value is key, value is query, padding is None, mask is None)
        weight = self._parameters.get("in_proj_weight")  # it stands for all weights
        trains = torch.is_grad_enabled() and (weight is None or weight.requires_grad)
        state = (self.backend, self.training, self.dropout, torch.is_grad_enabled(), trains)
        return tensors, (flags, same, state)

    def _attend(self, given: Inputs, masks: Masks, flags: Flags) -> tuple[Tensor, Tensor | None]:
        query, key, value = given
        need_weights, average_attn_weights, _ = flags
        batched = query.dim() == 3
        # Sequences stay in the caller's order, [B, L, E] or [L, B, E]: projecting needs no copy.
        batch_first = self.batch_first or not batched
        if not batched:
            query, key, value = unsqueezed(query, key, value)
        self._check(query, key, value, batch_first)
        heads = [self._split(x, batch_first) for x in self._project(query, key, value, batch_first)]
        batch, count, steps, _ = heads[0].shape
        sizes = (batch, count, steps, heads[1].size(2))
        mask = merged(masks, sizes, self._appended(), heads[0].dtype, batched)
        kind = ("mean" if average_attn_weights else "heads") if need_weights else None
        if self._drops():
            result: Any = with_dropout(heads, mask, kind, self.dropout)
        else:
            result = cross_attention(*heads, mask=mask, need_weights=kind, backend=self.backend)
        context, weights = result if isinstance(result, tuple) else (result, None)
        if weights is not None and mask is not None:
            context, weights = nan_where_nothing(context, weights, mask)
        order = (0, 2, 1, 3) if batch_first else (2, 0, 1, 3)
        output = self._linear(
            context.permute(order).flatten(2), self.out_proj.weight, self.out_proj.bias
        )
        if not batched:
            return output[0], None if weights is None else weights[0]
        return output, weights

    def _appended(self) -> int:
        """Positions that bias_k and zeros append to the keys."""
        return int(self.bias_k is not None) + int(self.add_zero_attn)

    def _drops(self) -> bool:
        return self.training and self.dropout > 0

    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the projections of query, key and value; one for all is given three times."""
        if self._qkv_same_embed_dim:
            return (self.in_proj_weight,) * 3
        return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight

    def _is_stock(self, given: Inputs, masks: Masks, flags: Flags) -> bool:
        """Whether torch's own forward serves this call.

        Raises:
            BackendUnavailableError: it must, and another backend is named.
            TypeError, ValueError: shapes or dtypes do not fit.
        """
        named = self.backend not in ("auto", "torch")
        reason = self._why_torch(given, masks[1], flags[2], named)
        if reason is not None and named:
            raise BackendUnavailableError(
                f"{MODULE}: backend {self.backend!r} cannot run: {reason};"
                " use backend='auto' or 'torch'"
            )
        if reason is not None:
            return True
        if torch.compiler.is_compiling() or tracing.in_functorch():
            return False
        query, key, value = given
        weights = self._weights()
        trains = tracing.may_need_grad((*given, *weights))
        masked = any(mask is not None for mask in masks)
        if trains and masked:
            return False
        batched = query.dim() == 3
        if not batched:
            query, key, value = unsqueezed(query, key, value)
        batch_first = self.batch_first or not batched
        self._check(query, key, value, batch_first)
        axis = 0 if batch_first else 1
        steps, positions = query.size(1 - axis), key.size(1 - axis) + self._appended()
        sizes = (query.size(axis), self.num_heads, steps, positions)
        merged(masks, sizes, self._appended(), query.dtype, batched)  # checks them
        if self.backend == "torch":
            return True
        return not self._kernels_win((query, key, value), sizes, flags[0], masked, trains)

    def _kernels_win(
        self,
        given: Inputs,
        sizes: Sizes,
        need_weights: bool,
        masked: bool,
        trains: bool,
    ) -> bool:
        """Whether a kernel is the choice for the attention or for a projection."""
        query, key, value = given
        kind = "heads" if need_weights else None
        named = sizes_of((*sizes, self.head_dim, self.head_dim), kind, masked)
        named["training"] = int(trains)
        if self._drops():
            dispatch.observe(NAME, query.device, query.dtype, named, DROPS)
        elif dispatch.select(NAME, self.backend, query.device, query.dtype, named) != "torch":
            return True
        products = [(query, self.out_proj.weight)]
        if not self._qkv_same_embed_dim:
            products += zip(given, self._weights(), strict=True)
        elif query is key and key is value:
            products.append((query, self.in_proj_weight))
        elif key is value:
            size = self.embed_dim
            products += zip(given, self.in_proj_weight.split([size, 2 * size]), strict=False)
        else:
            products += zip(given, self.in_proj_weight.chunk(3), strict=True)
        return any(linear_choice(x, w, self.in_proj_bias)[0] != "torch" for x, w in products)

    def _why_torch(
        self, given: Inputs, attn_mask: Tensor | None, is_causal: bool, named: bool
    ) -> str | None:
        """Why torch's own forward must serve this call; a named backend cannot do without."""
        query, key, value = given
        if named and self._drops():
            return DROPS
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

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"
