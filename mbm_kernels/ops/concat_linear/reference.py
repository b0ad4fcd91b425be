"""The definition of a linear layer over concatenated inputs, without tricks."""

from collections.abc import Sequence

import torch
from torch import Tensor


def concat_linear(inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """inputs of [..., C_i] with leading dimensions that broadcast, weight [K, C] -> [..., K]."""
    leading = torch.broadcast_shapes(*(x.shape[:-1] for x in inputs))
    joined = torch.cat([x.expand(*leading, x.size(-1)) for x in inputs], -1)
    y = joined @ weight.t()
    return y if bias is None else y + bias
