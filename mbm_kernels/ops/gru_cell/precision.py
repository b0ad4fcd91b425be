"""Tensors as the CPU kernels of gru_cell and gru take them, in float32, and back in their dtype."""

import torch
from torch import Tensor

from mbm_kernels._core import packing


def rows(tensor: Tensor) -> Tensor:
    """float32 with contiguous rows; the other strides may be anything."""
    if tensor.dtype is not torch.float32:
        tensor = tensor.to(torch.float32)
    return tensor if tensor.stride(-1) == 1 or tensor.size(-1) == 1 else tensor.contiguous()


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if dtype is torch.float32 else tensor.to(dtype)


def optional_rounded(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else rounded(tensor, dtype)


def _elements(weight: Tensor) -> int:
    return weight.numel()


def _widen(out: Tensor, weight: Tensor) -> None:
    out.copy_(weight.reshape(-1))


def plain(weight: Tensor) -> Tensor:
    """A weight as contiguous float32: itself, or a copy kept as long as the weight lives."""
    if weight.dtype is torch.float32 and weight.is_contiguous():
        return weight
    return packing.packed(_elements, _widen, weight)
