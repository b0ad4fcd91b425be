"""The graph of one container's own forward, by torch.fx: other modules are single nodes in it."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.fx
from torch import nn

from mbm_kernels.nn import counterparts


class UntraceableError(Exception):
    """Why a forward has no graph."""


@dataclass
class Traced:
    """A container's graph, the arguments it takes, and the nn.Sequential that it looks into."""

    graph: torch.fx.Graph
    arguments: tuple[str, ...]
    inlined: list[nn.Module]


class _Symbol(torch.fx.Proxy):
    """Records `x += y` as it is written; torch.fx would as `x = x + y`."""


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def record(self: torch.fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imod", "imatmul"):
    setattr(_Symbol, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(torch.fx.Tracer):
    def __init__(self, arguments: tuple[str, ...]):
        super().__init__()
        self.arguments = arguments
        self.inlined: list[nn.Module] = []

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _Symbol(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if not is_sequential(m) or counterparts.has_hooks(m):
            return True
        self.inlined.append(m)
        return False

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Symbols for the arguments that have no default; the others are left at it."""
        symbols = (self.create_proxy("placeholder", name, (), {}) for name in self.arguments)
        return root_fn, [self.root, *symbols]


def is_sequential(module: nn.Module) -> bool:
    """Whether its forward is nn.Sequential's."""
    own = getattr(type(module), "forward", None) is nn.Sequential.forward
    return own and "forward" not in vars(module)


def trace(module: nn.Module) -> Traced:
    """The graph of a module's forward in its present mode, other arguments at their defaults.

    Raises:
        UntraceableError: with the reason.
    """
    if "forward" in vars(module):
        raise UntraceableError("its forward was replaced on the instance")
    if hasattr(type(module).forward, "__wrapped__"):
        raise UntraceableError("its forward is decorated")
    arguments = _required(module)
    tracer = _Tracer(arguments)
    before = dict(vars(module))
    try:
        graph = tracer.trace(module)
    except Exception as error:  # whatever code does that meets a symbol
        words = " ".join(str(error).split())
        raise UntraceableError(f"{type(error).__name__}: {words[:120]}") from error
    finally:
        after = dict(vars(module))
        vars(module).clear()
        vars(module).update(before)
    if after.keys() != before.keys() or any(after[k] is not v for k, v in before.items()):
        raise UntraceableError("its forward sets attributes")
    return Traced(graph, arguments, tracer.inlined)


def _required(module: nn.Module) -> tuple[str, ...]:
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            raise UntraceableError(f"its argument {parameter.name} is given by name only")
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind in plain and p.default is p.empty)
