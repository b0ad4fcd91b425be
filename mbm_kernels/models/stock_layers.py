"""The models' layers in stock PyTorch, with the parameter names and shapes of mbm_kernels.nn.

Each is the best plain form known for the operation, so a comparison with it is honest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvBiasAct(nn.Conv2d):
    """Conv2d, residual, relu and max pooling; parameters as ``nn.Conv2d``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        padding: int = 0,
        activation: str | None = None,
        max_pool: int | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=padding)
        if activation not in (None, "relu"):
            raise ValueError(f"activation: got {activation!r}, expected None or 'relu'")
        self.activation = activation
        self.max_pool = max_pool

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        if residual is not None:
            y = y + residual
        # Pooling first halves the bytes that relu touches by four and commutes with it.
        if self.max_pool is not None:
            y = F.max_pool2d(y, self.max_pool)
        return F.relu(y) if self.activation == "relu" else y


class ConcatLinear(nn.Linear):
    """Linear over the concatenation of the broadcast inputs."""

    def __init__(self, in_features: Sequence[int], out_features: int) -> None:
        super().__init__(sum(in_features), out_features)

    def forward(self, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        return concat_linear(inputs, self.weight, self.bias)


def concat_linear(inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer over the concatenation of the broadcast inputs [..., C_i]."""
    leading = torch.broadcast_shapes(*(x.shape[:-1] for x in inputs))
    parts = [x.expand(*leading, x.shape[-1]) for x in inputs]
    return F.linear(torch.cat(parts, dim=-1), weight, bias)


def last_state(gru: nn.GRU, x: Tensor, lengths: Tensor | None) -> Tensor:
    """State [B, H] of a batch-first layer after each row's last step; x [B, T, C], lengths [B].

    All rows run to T and the state is taken where a row ends: a packed sequence computes the same.
    """
    y, h_n = gru(x)
    if lengths is None:
        return h_n[-1]
    last = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, y.shape[-1])
    return y.gather(1, last).squeeze(1).masked_fill((lengths == 0)[:, None], 0.0)


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    kind: str = "infonce",
) -> Tensor:
    """Softmax (CLIP) or sigmoid (SigLIP) loss of pairs; image, text [B, D], scale and bias []."""
    logits = (image * scale) @ text.t()  # [B, B]; pairs stand on the diagonal
    if kind == "infonce":
        by_image = torch.log_softmax(logits, 1).diagonal()
        by_text = torch.log_softmax(logits, 0).diagonal()
        return -(by_image + by_text).mean() / 2
    if kind != "siglip":
        raise ValueError(f"kind: got {kind!r}, expected 'infonce' or 'siglip'")
    if bias is not None:
        logits = logits + bias
    margins = -logits
    margins.diagonal().neg_()
    return -F.logsigmoid(margins).sum() / len(image)


def gru_cell(
    x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
) -> Tensor:
    """One GRU step; x [B, C], h [B, H]."""
    return torch.gru_cell(x, h, w_ih, w_hh, b_ih, b_hh)


def additive_attention(
    query: Tensor, key: Tensor, value: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Softmax over S of v . tanh(query + key); query [B, T, D], key [B, S, D], value [B, S, E]."""
    scores = torch.tanh(query.unsqueeze(2) + key.unsqueeze(1)) @ v  # [B, T, S]
    weights = scores.softmax(dim=-1)
    return weights @ value, weights


def cross_attention(
    query: Tensor, key: Tensor, value: Tensor, *, need_weights: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Scaled dot attention with its weights averaged over heads; query [B, N, T, D]."""
    if need_weights != "mean":
        raise ValueError(f"need_weights: got {need_weights!r}, expected 'mean'")
    scale = query.shape[-1] ** -0.5
    weights = ((query * scale) @ key.transpose(-1, -2)).softmax(dim=-1)  # [B, N, T, S]
    return weights @ value, weights.mean(dim=1)


class AdditiveAttention(nn.Module):
    """Additive attention with projections of query and key; parameters as mbm_kernels.nn."""

    def __init__(self, query_dim: int, key_dim: int, attention_dim: int) -> None:
        super().__init__()
        self.query_proj = nn.Linear(query_dim, attention_dim)
        self.key_proj = nn.Linear(key_dim, attention_dim)
        self.v = nn.Parameter(torch.empty(attention_dim))
        nn.init.uniform_(self.v, -(attention_dim**-0.5), attention_dim**-0.5)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        value = key if value is None else value
        return additive_attention(self.query_proj(query), self.key_proj(key), value, self.v)
