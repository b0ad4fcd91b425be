"""Squeeze-and-excitation around its convolutions: the mean of each plane, and its factor.

Source: J. Hu, L. Shen and G. Sun, "Squeeze-and-Excitation Networks", CVPR 2018.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from mbm_kernels.nn import counterparts
from mbm_kernels.optimize.held import OfModules, holder

Place = tuple[int, int]  # csrc's ConvPlace
Modules = Mapping[str, nn.Module]  # of a container by path, itself by ""

MEANS = (torch.mean, "mean")
MEAN_ARGUMENTS = ("dim", "keepdim")
PLANES = [kind(d) for kind in (tuple, list) for d in ((2, 3), (3, 2), (-2, -1), (-1, -2))]
PRODUCTS = (operator.mul, torch.mul, "mul")
HARDSIGMOIDS = (nn.Hardsigmoid, F.hardsigmoid)


@dataclass(frozen=True, slots=True, eq=False)
class NativeMeans:
    """Means of planes as csrc's ConvSequence takes them. sizes: B, C, pixels, channels_last."""

    sizes: tuple[int, int, int, bool]
    y_shape: tuple[int, ...]
    y_strides: tuple[int, ...]
    held: tuple[Tensor, ...] = ()

    def add_to(self, call: Any, places: Sequence[Place]) -> None:
        x, _, y = places
        call.add_means(self.sizes, [x, y])


@dataclass(frozen=True, slots=True, eq=False)
class NativeScale:
    """A product with a factor for each plane; swapped: the factors come first."""

    sizes: tuple[int, int, int, bool]
    hardsigmoid: bool
    swapped: bool
    y_shape: tuple[int, ...]
    y_strides: tuple[int, ...]
    held: tuple[Tensor, ...] = ()

    def add_to(self, call: Any, places: Sequence[Place]) -> None:
        first, second, y = places
        maps = [second, first, y] if self.swapped else [first, second, y]
        call.add_scale(self.sizes, self.hardsigmoid, maps)


@dataclass(eq=False)
class Squeeze(OfModules):
    """The mean of each plane, [B, C, 1, 1]: over `dims`, or as nn.AdaptiveAvgPool2d computes it."""

    dims: tuple[int, ...] | None

    def __call__(self, x: Tensor, _other: Tensor | None = None) -> Tensor:
        if self.dims is None:
            return F.adaptive_avg_pool2d(x, 1)
        return x.mean(self.dims, keepdim=True)

    def native(self, x: Tensor, _other: Tensor | None, y: Tensor) -> NativeMeans | None:
        """This call; None where the kernel does not take such a map."""
        sizes = _dense(x)
        if sizes is None or not _are_factors(y, sizes):
            return None
        return NativeMeans(sizes, tuple(y.shape), y.stride())


@dataclass(eq=False)
class Scale(OfModules):
    """The product of a map and of a factor for each of its planes, in either order.

    gated: which of the two goes through Hardsigmoid first, 0 or 1; None: neither.
    """

    gated: int | None

    def __call__(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        assert second is not None
        if self.gated == 0:
            first = F.hardsigmoid(first)
        elif self.gated == 1:
            second = F.hardsigmoid(second)
        return first * second

    def native(self, first: Tensor, second: Tensor | None, y: Tensor) -> NativeScale | None:
        """This call; None where no kernel takes such a product."""
        assert second is not None
        for swapped, (x, factors) in enumerate(((first, second), (second, first))):
            sizes = _dense(x)
            fits = sizes is not None and _are_factors(factors, sizes) and y.shape == x.shape
            if fits and y.stride() == x.stride() and self.gated in (None, 1 - swapped):
                assert sizes is not None
                gated = self.gated is not None
                return NativeScale(sizes, gated, bool(swapped), tuple(y.shape), y.stride())
        return None


def _dense(x: Tensor) -> tuple[int, int, int, bool] | None:
    """B, C, pixels and whether it is channels_last, of a map without gaps."""
    if x.dim() != 4 or x.dtype is not torch.float32 or not x.is_cpu or 0 in x.shape[1:]:
        return None
    batch, channels, height, width = x.shape
    pixels = height * width
    if x.is_contiguous():
        return batch, channels, pixels, False
    last = x.is_contiguous(memory_format=torch.channels_last)
    return (batch, channels, pixels, True) if last else None


def _are_factors(t: Tensor, sizes: tuple[int, int, int, bool]) -> bool:
    """Whether it is [B, C, 1, 1] without gaps."""
    batch, channels, _, _ = sizes
    plain = t.dtype is torch.float32 and t.is_cpu and t.shape == (batch, channels, 1, 1)
    return plain and without_gaps(t)


def without_gaps(t: Tensor) -> bool:
    return t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last)


def squeeze_of(node: Node, modules: Modules) -> Squeeze | None:
    """The mean over the planes of its input that a node is; None: it is none."""
    if len(node.all_input_nodes) != 1 or not node.args or not isinstance(node.args[0], Node):
        return None
    if node.op == "call_module":
        module = modules.get(str(node.target))
        if type(module) is not nn.AdaptiveAvgPool2d or node.kwargs or len(node.args) != 1:
            return None
        if not _of_one_pixel(module.output_size) or not is_free(module):
            return None
        return _of(Squeeze, modules, str(node.target), dims=None)
    if node.op == "call_function" and node.target is F.adaptive_avg_pool2d:
        size = {**dict(zip(("output_size",), node.args[1:], strict=False)), **node.kwargs}
        one = size.keys() == {"output_size"} and _of_one_pixel(size["output_size"])
        return Squeeze(dims=None) if one else None
    if node.op in ("call_function", "call_method") and node.target in MEANS:
        given = {**dict(zip(MEAN_ARGUMENTS, node.args[1:], strict=False)), **node.kwargs}
        dims: Any = given.get("dim")
        if dims in PLANES and given == {"dim": dims, "keepdim": True}:
            return Squeeze(dims=tuple(dims))
    return None


def scale_of(node: Node, modules: Modules) -> tuple[Scale, tuple[Node, Node], Node | None] | None:
    """The product of two maps that a node is, what it multiplies, and the Hardsigmoid that is part
    of it; None: it is none."""
    if node.op not in ("call_function", "call_method") or node.target not in PRODUCTS:
        return None
    if node.kwargs or len(node.args) != 2:
        return None
    first, second = node.args
    if not isinstance(first, Node) or not isinstance(second, Node) or first is second:
        return None
    for i, factors in enumerate((first, second)):
        found = _hardsigmoid(factors, modules)
        if found is not None:
            path, before = found
            reads = (first, before) if i else (before, second)
            return _of(Scale, modules, path, gated=i), reads, factors
    return Scale(gated=None), (first, second), None


def gates(node: Node, modules: Modules) -> bool:
    """Whether the result of a node goes, through Hardsigmoid at most, to a product of maps."""
    for user in node.users:
        kind = type(modules.get(str(user.target))) if user.op == "call_module" else user.target
        if user.target in PRODUCTS or (kind in HARDSIGMOIDS and gates(user, modules)):
            return True
    return False


def _hardsigmoid(node: Node, modules: Modules) -> tuple[str | None, Node] | None:
    """The module's path and the input of a Hardsigmoid; nothing else reads either."""
    if len(node.users) != 1 or len(node.args) != 1:
        return None
    (before,) = node.args
    if not isinstance(before, Node) or len(before.users) != 1:
        return None
    if node.op == "call_module" and not node.kwargs:
        module = modules.get(str(node.target))
        if type(module) is not nn.Hardsigmoid or not is_free(module):
            return None
        return str(node.target), before
    plain = node.op == "call_function" and node.target is F.hardsigmoid
    return (None, before) if plain and not any(node.kwargs.values()) else None


def _of(kind: Any, modules: Modules, path: str | None, **options: Any) -> Any:
    if path is None:
        return kind(**options)
    return kind(modules=(modules[path],), holders=(holder(modules[""], path),), **options)


def _of_one_pixel(size: Any) -> bool:
    return size in (1, (1, 1), [1, 1])


def is_free(module: nn.Module) -> bool:
    """Whether nothing but its class says what it does."""
    return "forward" not in vars(module) and not counterparts.has_hooks(module)
