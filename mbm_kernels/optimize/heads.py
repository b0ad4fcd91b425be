"""A classifier's linear layers behind convolutions, as steps of a sequence.

The native code reads their weights where they lie: nothing is packed, hashed or kept of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from mbm_kernels._core import dispatch
from mbm_kernels._core.unchanged import Watch
from mbm_kernels.ops.concat_linear.problem import FEW_ROWS, NAME, sizes_of
from mbm_kernels.ops.conv_bias_act.activations import TABLE
from mbm_kernels.ops.conv_bias_act.geometry import ACTIVATIONS
from mbm_kernels.optimize import gating, nodes
from mbm_kernels.optimize.chain import TURN_NS, Among
from mbm_kernels.optimize.held import OfModules, holder

Place = tuple[int, int]  # csrc's ConvPlace
Modules = Mapping[str, nn.Module]  # of a container by path, itself by ""

FLATTEN_ARGUMENTS = {"start_dim": 0, "end_dim": -1}
DROPOUT_ARGUMENTS = {"p": 0.5, "training": True, "inplace": False}


@dataclass(frozen=True, slots=True, eq=False)
class NativeHead:
    """A linear layer as csrc's ConvSequence takes it. sizes: B, C, K, the activation's number."""

    sizes: tuple[int, int, int, int]
    live: tuple[Tensor, ...]  # the weight, and the bias if there is one
    y_shape: tuple[int, ...]
    y_strides: tuple[int, ...]
    held: tuple[Tensor, ...] = ()

    def add_to(self, call: Any, places: Sequence[Place]) -> None:
        x, _, y, weight, *bias = places
        call.add_head(self.sizes, [x, weight, *(bias or [(-1, 0)]), y])


@dataclass(eq=False)
class Head(OfModules):
    """nn.Linear of [B, C], or of a map that is flattened first, and an activation."""

    linear: nn.Linear
    activation: str | None
    flattens: bool

    def __call__(self, x: Tensor, _other: Tensor | None = None) -> Tensor:
        x = x.flatten(1) if self.flattens else x
        y = F.linear(x, self.linear.weight, self.linear.bias)
        return y if self.activation is None else TABLE[self.activation].fresh(y)

    def watch_constants(self, watch: Watch) -> None:
        """Adds what a native call goes by beside its tensors."""
        parameters = vars(self.linear)["_parameters"]
        watch.attributes(self.linear, "_parameters")
        watch.items(parameters, parameters)

    def native(self, x: Tensor, _other: Tensor | None, y: Tensor) -> NativeHead | None:
        """This call; None where PyTorch is faster, or no kernel takes such tensors."""
        weight, bias = self.linear.weight, self.linear.bias
        live = (weight,) if bias is None else (weight, bias)
        if not all(_is_plain(t) for t in (x, y, *live)) or not self._lies_flat(x):
            return None
        fits = weight.shape == (y.size(-1), self._flat(x)[1])
        if not fits or (bias is not None and bias.shape != weight.shape[:1]):
            return None  # PyTorch says what is wrong, or broadcasts
        found = self._among(x)
        if found.backend != "cpu" or len(x) > FEW_ROWS:
            return None
        rows, features = self._flat(x)
        sizes = (rows, features, len(weight), ACTIVATIONS.index(self.activation))
        return NativeHead(sizes, live, tuple(y.shape), y.stride())

    def ns(self, x: Tensor) -> float:
        """What it is predicted to take among others."""
        copied = 0.0 if self._lies_flat(x) else TURN_NS * x.numel()
        return self._among(x).ns + copied

    def _among(self, x: Tensor) -> Among:
        weight = self.linear.weight
        flat = torch.empty(self._flat(x), device="meta")
        sizes = {**sizes_of((flat,), flat.shape[:1], weight), "training": 0}
        backend = dispatch.select_among_others(NAME, "auto", x.device, x.dtype, sizes)
        return Among(backend, dispatch.predicted(NAME, sizes))

    def _flat(self, x: Tensor) -> tuple[int, int]:
        return len(x), math.prod(x.shape[1:])

    def _lies_flat(self, x: Tensor) -> bool:
        """Whether the rows are one after another in memory."""
        if self.flattens and x.dim() == 4 and x.shape[2:] == (1, 1):
            return gating.without_gaps(x)
        return x.is_contiguous() and (x.dim() == 2 or self.flattens)


def _is_plain(t: Tensor) -> bool:
    plain = type(t) in (Tensor, nn.Parameter) and t.dtype is torch.float32 and t.is_cpu
    return plain and (t.dim() > 2 or t.is_contiguous())


def head_of(
    node: Node, modules: Modules, flat: set[Node], may_change: Callable[[Node], bool]
) -> tuple[Head, Node, tuple[Node, ...]] | None:
    """The linear layer that ends at a node, or the activation after one; what it reads; and nodes
    before this one that are part of it. None: the node is no such end.

    flat: nodes known to be of two dimensions. may_change: whether a node may be replaced.
    """
    activation = _activation(node, modules, may_change)
    linear: Any = node if activation is None else node.args[0]
    if not _is_linear(linear, modules) or not may_change(linear):
        return None
    within: list[Node] = []
    if activation is not None:
        within.append(linear)
    elif any(_activation(user, modules, may_change) for user in linear.users):
        return None  # it is part of that one
    before: Any = linear.args[0]
    flattens = False
    while not flattens:
        part = _passed(before, modules)
        if part is None or not may_change(before):
            break
        flattens = part == "flatten"
        within.append(before)
        before = before.args[0]
    if not flattens and before not in flat:
        return None
    if len(before.users) != 1 and len(within) > (activation is not None):
        return None  # another may write it meanwhile
    called = [str(n.target) for n in (*within, node) if n.op == "call_module"]
    module: Any = modules[str(linear.target)]
    head = Head(
        module,
        activation,
        flattens,
        modules=tuple(modules[path] for path in called),
        holders=tuple(holder(modules[""], path) for path in called),
    )
    return head, before, tuple(within)


def is_flat(node: Node, modules: Modules, flat: set[Node]) -> bool:
    """Whether a node's result is known to be of two dimensions."""
    passed = _passed(node, modules)
    if passed is not None:
        return passed == "flatten" or node.args[0] in flat
    if node.op == "call_method" and node.target in ("view", "reshape"):
        sizes = node.args[1:]
        return len(sizes) == 2 and not any(isinstance(size, (tuple, list)) for size in sizes)
    return False


def _passed(node: Any, modules: Modules) -> str | None:
    """'flatten' for one from the second dimension on, 'same' for a dropout in eval mode; only where
    nothing else reads the result."""
    if not isinstance(node, Node) or len(node.users) != 1:
        return None
    if not node.args or not isinstance(node.args[0], Node):
        return None
    module = _module(node, modules)
    if isinstance(module, nn.Flatten) and type(module) is nn.Flatten:
        return "flatten" if (module.start_dim, module.end_dim) == (1, -1) else None
    if module is not None:
        return "same" if nodes.is_dropout(type(module)) and not module.training else None
    if node.target in (torch.flatten, "flatten"):
        options = nodes.options(node, FLATTEN_ARGUMENTS)
        return "flatten" if options == {"start_dim": 1, "end_dim": -1} else None
    if node.target is F.dropout:
        options = nodes.options(node, DROPOUT_ARGUMENTS)
        return "same" if options is not None and options["training"] is False else None
    return None


def _module(node: Node, modules: Modules) -> nn.Module | None:
    """The module that a node calls with one argument, where only its class says what it does."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    module = modules.get(str(node.target))
    return module if module is not None and gating.is_free(module) else None


def _is_linear(node: Any, modules: Modules) -> bool:
    return isinstance(node, Node) and type(_module(node, modules)) is nn.Linear


def _activation(node: Node, modules: Modules, may_change: Callable[[Node], bool]) -> str | None:
    """The activation that a node is of a linear layer's result that nothing else reads."""
    if not node.args or not _is_linear(node.args[0], modules):
        return None
    (linear, *_) = node.all_input_nodes
    if len(linear.users) != 1 or not may_change(node):
        return None
    module = _module(node, modules)
    if module is None:
        return nodes.activation_called(node)
    named = nodes.activation_of(type(module))
    return None if named is None else named(module)
