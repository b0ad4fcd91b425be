"""Arguments of an operation, some of which are lists of tensors."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import torch_private

Layout = tuple[int | None, ...]  # length of each list argument, None if it is not a list


def looped(registered: Callable[..., Any]) -> Callable[..., Any]:
    """The vmap rule that calls `registered` for each element of the batch."""

    def element(arg: Any, dim: Any, i: int) -> Any:
        if isinstance(arg, (list, tuple)) and isinstance(dim, (list, tuple)):
            return [element(a, d, i) for a, d in zip(arg, dim, strict=True)]
        return arg if dim is None else arg.select(dim, i)

    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        calls = [
            registered(*(element(a, d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        stacked = [torch.stack(outputs) for outputs in zip(*calls, strict=True)]
        return stacked, [0] * len(stacked)

    return rule


def as_tuple(outputs: Any) -> tuple[Any, ...]:
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def flat(args: Any) -> list[Any]:
    found: list[Any] = []
    for arg in args:
        if isinstance(arg, (list, tuple)):
            found.extend(arg)
        else:
            found.append(arg)
    return found


def grouped(values: Sequence[Any], layout: Layout) -> tuple[Any, ...]:
    """The arguments that `values` was made of: a list of each length in `layout`, None no list."""
    rest = iter(values)
    return tuple(
        next(rest) if length is None else [next(rest) for _ in range(length)] for length in layout
    )


def layout_of(args: Sequence[Any]) -> Layout:
    return tuple(len(arg) if isinstance(arg, (list, tuple)) else None for arg in args)


def spread(values: Sequence[Any], needs: Sequence[bool], found: Iterator[Any]) -> list[Any]:
    """The next of `found` for each tensor of `values` that is needed, None for the others; flat."""
    out: list[Any] = []
    for value, needed in zip(values, needs, strict=True):
        if isinstance(value, (list, tuple)):
            out.extend(next(found) if needed else None for _ in value)
        else:
            out.append(next(found) if needed and value is not None else None)
    return out


def is_tensors(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(isinstance(v, Tensor) for v in value)
    return isinstance(value, Tensor)


def any_of(needs: Any) -> bool:
    return any(needs) if isinstance(needs, (list, tuple)) else bool(needs)


def fresh(output: Tensor, args: Sequence[Any]) -> Tensor:
    """A registered op may not return a view of an input, as a no-op in plain torch may."""
    storages = {
        torch_private.storage_of(a) for a in flat(args) if isinstance(a, Tensor) and a.numel() > 0
    }
    return output.clone() if torch_private.storage_of(output) in storages else output
