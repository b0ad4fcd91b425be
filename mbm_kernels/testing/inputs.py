"""An operation's arguments by name, as tests pass them around: tensors, lists of them, options."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

Inputs = dict[str, Any]


def map_tensors(inputs: Inputs, f: Callable[[Tensor], Tensor]) -> Inputs:
    """`inputs` with f applied to each tensor, in lists and tuples too."""

    def apply(value: Any) -> Any:
        if isinstance(value, Tensor):
            return f(value)
        if isinstance(value, (list, tuple)):
            return type(value)(apply(v) for v in value)
        return value

    return {name: apply(value) for name, value in inputs.items()}


def map_floating(inputs: Inputs, f: Callable[[Tensor], Tensor]) -> Inputs:
    return map_tensors(inputs, lambda x: f(x) if x.is_floating_point() else x)


def flat_tensors(inputs: Inputs) -> list[Tensor]:
    found: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        found.append(x)
        return x

    map_tensors(inputs, note)
    return found


def with_leaves(inputs: Inputs, diff: tuple[str, ...]) -> tuple[Inputs, dict[str, Tensor]]:
    """`inputs` with those of `diff` as leaves that require a gradient, and the leaves by name."""
    result, leaves = dict(inputs), {}
    for name in diff:
        value = inputs.get(name)
        if isinstance(value, Tensor):
            result[name] = leaves[name] = value.detach().requires_grad_()
        elif isinstance(value, (list, tuple)):
            result[name] = [v.detach().requires_grad_() for v in value]
            leaves |= {f"{name}[{i}]": v for i, v in enumerate(result[name])}
    return result, leaves
