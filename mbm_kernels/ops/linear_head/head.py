"""The sizes of a linear head, and its rows as the kernels take them."""

import math
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import autocast, checks


def check(
    op: str, hidden: Any, weight: Any, bias: Any, owner: str = "", features_letter: str = "H"
) -> tuple[int, int]:
    """The sizes V and H of hidden [..., H], weight [V, H] and bias [V] or None.

    `owner` stands before the arguments' names.
    """
    hidden = checks.tensor(op, f"{owner}hidden", hidden)
    if hidden.dim() == 0:
        got, remedy = "a tensor without dimensions", "give the hidden size as last dimension"
        checks.fail(op, f"{owner}hidden", got, f"[..., {features_letter}]", remedy)
    weight = checks.tensor(op, f"{owner}weight", weight, 2)
    classes, features = weight.size(0), hidden.size(-1)
    checks.shape(op, f"{owner}weight", weight, f"V, {features_letter}", (classes, features))
    if bias is not None:
        checks.tensor(op, f"{owner}bias", bias, 1)
        checks.shape(op, f"{owner}bias", bias, "V", (classes,))
    return classes, features


def rows_of(x: Tensor) -> Tensor:
    """[..., H] as [N, H]: itself where it has two dimensions, a view if it can be."""
    if x.dim() == 2:
        return x
    return x.reshape(math.prod(x.shape[:-1]), x.size(-1))


def flat(x: Tensor) -> Tensor:
    """[...] as [N]: itself where it has one dimension."""
    return x if x.dim() == 1 else x.reshape(-1)


def result_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of a loss: that of `hidden`, float32 under autocast."""
    if hidden.dtype != torch.float64 and autocast.enabled(hidden.device):
        return torch.float32
    return hidden.dtype
