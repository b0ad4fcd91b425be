"""Batch norms that a chain folds into its convolution: PyTorch's own, and those of packages.

Packages' classes are known by name. Some call a dropout and an activation after the norm's part.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

PACKAGES_NORMS = (
    "timm.layers.norm_act.BatchNormAct2d",
    "timm.layers.norm_act.FrozenBatchNormAct2d",
    "torchvision.ops.misc.FrozenBatchNorm2d",
)
AFTER_THE_NORM = ("drop", "act")


def full_name(kind: type[nn.Module]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def is_norm(kind: type[nn.Module]) -> bool:
    return kind is nn.BatchNorm2d or full_name(kind) in PACKAGES_NORMS


def calls(norm: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that its forward calls after the norm's own part, in order, by their names."""
    modules = ((name, norm._modules.get(name)) for name in AFTER_THE_NORM)
    return [(name, module) for name, module in modules if module is not None]


def normalized(norm: Any, x: Tensor) -> Tensor:
    """The norm's own part in eval mode, without what it calls after it."""
    return F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    )


def why_not_folded(conv: nn.Conv2d, norm: Any) -> str | None:
    """Why it cannot be folded into the convolution before it."""
    name = type(norm).__name__
    if norm.running_mean is None or norm.running_var is None:
        return f"its {name} keeps no running statistics"
    given = (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    tensors = [t for t in given if t is not None]
    if any(t.dtype != conv.weight.dtype or t.device != conv.weight.device for t in tensors):
        return f"its {name} has another dtype or device"
    if len(norm.running_mean) != conv.out_channels:
        return f"its {name} has another number of channels"
    return f"its {name} is in training mode" if norm.training else None
