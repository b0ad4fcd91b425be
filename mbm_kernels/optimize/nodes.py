"""What single nodes of a graph and modules compute, as far as a chain or a linear layer cares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from mbm_kernels.optimize import norms

ACTIVATION_MODULES: dict[type[nn.Module], Callable[[Any], str | None]] = {
    nn.ReLU: lambda m: "relu",
    nn.ReLU6: lambda m: "relu6",
    nn.LeakyReLU: lambda m: _leaky(m.negative_slope),
    nn.SiLU: lambda m: "silu",
    nn.GELU: lambda m: _gelu(m.approximate),
    nn.Hardswish: lambda m: "hardswish",
    nn.Sigmoid: lambda m: "sigmoid",
    nn.Tanh: lambda m: "tanh",
}
# By function or method: the name, and the arguments after the input with their defaults.
ACTIVATION_CALLS: dict[Any, tuple[str, dict[str, Any]]] = {
    F.relu: ("relu", {"inplace": False}),
    F.relu_: ("relu", {}),
    torch.relu: ("relu", {}),
    torch.relu_: ("relu", {}),
    "relu": ("relu", {}),
    "relu_": ("relu", {}),
    F.relu6: ("relu6", {"inplace": False}),
    F.leaky_relu: ("leaky_relu", {"negative_slope": 0.01, "inplace": False}),
    F.silu: ("silu", {"inplace": False}),
    F.gelu: ("gelu", {"approximate": "none"}),
    F.hardswish: ("hardswish", {"inplace": False}),
    torch.sigmoid: ("sigmoid", {}),
    F.sigmoid: ("sigmoid", {}),
    "sigmoid": ("sigmoid", {}),
    torch.tanh: ("tanh", {}),
    F.tanh: ("tanh", {}),
    "tanh": ("tanh", {}),
}
# Classes of packages that compute the same, by name.
PACKAGES_ACTIVATIONS = {
    "timm.layers.activations.Sigmoid": "sigmoid",
    "timm.layers.activations.Swish": "silu",
    "timm.layers.activations.Tanh": "tanh",
    "timm.layers.activations.HardSwish": "hardswish",
}
# Of these the input comes out in eval mode; those of packages by name.
DROPOUTS = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)
DROPPED_PATHS = ("torchvision.ops.stochastic_depth.StochasticDepth", "timm.layers.drop.DropPath")


def is_dropout(kind: type[nn.Module]) -> bool:
    return kind in DROPOUTS or norms.full_name(kind) in DROPPED_PATHS


def activation_of(kind: type[nn.Module]) -> Callable[[Any], str | None] | None:
    """What gives the name of the activation that a class is; None: it is none of ours."""
    name = PACKAGES_ACTIVATIONS.get(norms.full_name(kind))
    return ACTIVATION_MODULES.get(kind) if name is None else lambda _module: name


def activation_called(node: Node) -> str | None:
    """The name of the activation that a call of a function or method is; None: none of ours."""
    if node.op not in ("call_function", "call_method") or node.target not in ACTIVATION_CALLS:
        return None
    name, defaults = ACTIVATION_CALLS[node.target]
    given = options(node, defaults)
    return None if given is None else _named(name, given)


def options(node: Node, defaults: dict[str, Any]) -> dict[str, Any] | None:
    """A call's arguments after its input, by name; None where they are others than these."""
    given = dict(zip(defaults, node.args[1:], strict=False))
    if len(node.args) - 1 > len(defaults) or node.kwargs.keys() - defaults.keys():
        return None
    return {**defaults, **given, **node.kwargs}


def _named(name: str, options: dict[str, Any]) -> str | None:
    if name == "leaky_relu":
        return _leaky(options["negative_slope"])
    return _gelu(options["approximate"]) if name == "gelu" else name


def _leaky(slope: Any) -> str | None:
    return "leaky_relu" if slope == 0.01 else None


def _gelu(approximate: Any) -> str | None:
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
