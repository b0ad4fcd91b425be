"""Autocast for the public functions: inputs are cast once, kernels run with autocast off."""

from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import torch_private


def enabled(device: torch.device) -> bool:
    if not torch_private.autocast_enabled():  # 0.1 us; what follows takes 0.4
        return False
    # torch.is_autocast_enabled raises for device types that have no autocast.
    kind = device.type
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def cast(*tensors: Tensor | None) -> tuple[Any, ...]:  # None where the argument is
    """The tensors in autocast's dtype where it is on; float64 and integers stay as they are."""
    if not torch_private.autocast_enabled():
        return tensors
    device = next(t.device for t in tensors if t is not None)
    if not enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(
        t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype)
        for t in tensors
    )


def lowers_stock(device: torch.device) -> bool:
    """Whether autocast is on and torch's own recurrent layers answer in its dtype."""
    return device.type != "cpu" and enabled(device)


def spares_stock(device: torch.device) -> bool:
    """Whether autocast is on and torch's own recurrent layers answer in their weights' dtype."""
    return device.type == "cpu" and enabled(device)
