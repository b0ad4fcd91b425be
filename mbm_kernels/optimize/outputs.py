"""Tensors within what models take and return."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Each floating tensor in tensors, sequences, mappings and dataclasses, with where it is."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield path, value
    elif isinstance(value, PackedSequence):
        yield f"{path}.data", value.data
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, f"{path}[{key!r}]")
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from tensors(item, f"{path}[{i}]")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name), f"{path}.{field.name}")


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, PackedSequence):
        return value._replace(data=change(value.data))
    if isinstance(value, Mapping):
        return {key: mapped(item, change) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(item, change) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(item, change) for item in value)
    return value


def detached(value: Any) -> Any:
    """Copies that stand for inputs: no history, requiring gradients where the originals do."""
    return mapped(value, lambda t: t.detach().clone().requires_grad_(t.requires_grad))


def in_float64(value: Any) -> Any:
    """Copies as `detached` makes them, floating ones in float64."""

    def convert(tensor: Tensor) -> Tensor:
        made = tensor.detach().double() if tensor.is_floating_point() else tensor.detach().clone()
        return made.requires_grad_(tensor.requires_grad)

    return mapped(value, convert)
