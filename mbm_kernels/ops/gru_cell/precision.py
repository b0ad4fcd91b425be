"""Tensors as the CPU kernels of gru_cell and gru take them, in float32, and back in their dtype."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mbm_kernels._core import native, packing


class Rows:
    """How the kernels read a tensor of this shape: with its own strides, its rows being contiguous
    float32, or as a dense copy."""

    __slots__ = ("_as_is", "_shape", "strides")

    def __init__(self, shape: tuple[int, ...], strides: Sequence[int], dtype: torch.dtype):
        self._shape = shape
        self._as_is = dtype is torch.float32 and (strides[-1] == 1 or shape[-1] == 1)
        dense = torch.empty(shape, device="meta").stride()
        self.strides: tuple[int, ...] = tuple(strides) if self._as_is else dense

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor if self._as_is else native.empty(self._shape).copy_(tensor)


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
