"""Additive attention with its projections, as a module."""

import torch
from torch import Tensor, nn

from mbm_kernels._core import checks, dispatch, tracing
from mbm_kernels._core.drop_in import DropIn
from mbm_kernels.ops.additive_attention.keys import AdditiveAttentionKeys, additive_attention_keys
from mbm_kernels.ops.additive_attention.op import additive_attention
from mbm_kernels.ops.concat_linear.module import Linear


class AdditiveAttention(DropIn):
    """Projects query and key to a common size and attends by v . tanh(query + key).

    The projections are torch.nn.Linear, run by concat_linear where it is measured to win.

    Args:
        query_dim: features of the query.
        key_dim: features of the key.
        attention_dim: features of the common space.
        bias: whether `query_proj` and `key_proj` have biases.
        backend: as for `mbm_kernels.additive_attention`.

    Source: Bahdanau, Cho, Bengio, 2015, section A.1.2.
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        attention_dim: int,
        *,
        bias: bool = True,
        backend: str = "auto",
    ):
        dispatch.check_backend("nn.AdditiveAttention", backend)
        super().__init__()
        self.backend = backend
        linear = nn.Linear if backend == "torch" else Linear
        self.query_proj = linear(query_dim, attention_dim, bias=bias)
        self.key_proj = linear(key_dim, attention_dim, bias=bias)
        self.v = nn.Parameter(torch.empty(attention_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.query_proj.reset_parameters()
        self.key_proj.reset_parameters()
        # As a Linear with one output would be.
        bound = max(1, self.v.numel()) ** -0.5
        nn.init.uniform_(self.v, -bound, bound)

    def keys(self, key: Tensor) -> AdditiveAttentionKeys:
        """key [B, S, key_dim], projected and prepared once for several calls without gradients."""
        return additive_attention_keys(self.key_proj(key), backend=self.backend)

    @tracing.leaf
    def forward(
        self,
        query: Tensor,
        key: Tensor | AdditiveAttentionKeys,
        value: Tensor | None = None,
        *,
        key_lengths: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """query [B, T, query_dim], key [B, S, key_dim], value [B, S, E] or None for `key`.

        `key` may be what `keys` made of one; then it is given the value too.

        Returns:
            context [B, T, E] and weights [B, T, S].
        """
        if isinstance(key, AdditiveAttentionKeys):
            if value is None:
                remedy = "pass the features that the keys were made of"
                checks.fail("nn.AdditiveAttention", "value", None, "a tensor beside keys", remedy)
            projected: Tensor | AdditiveAttentionKeys = key
        else:
            projected, value = self.key_proj(key), key if value is None else value
        return additive_attention(
            self.query_proj(query),
            projected,
            value,
            self.v,
            key_lengths=key_lengths,
            mask=mask,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"
