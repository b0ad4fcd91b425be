"""A model's forward pass, watched: what each of its modules is called with and chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from mbm_kernels._core import dispatch

K = TypeVar("K")
_WATCHES = "_mbm_watches"


@dataclass
class Call:
    """One call: its arguments, and the choices of a backend made in it, not in other watched."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    seen: list[dispatch.Observed] = field(default_factory=list)


@contextmanager
def recorded(
    places: Mapping[K, tuple[Any, str]], keep: bool = True
) -> Iterator[dict[K, list[Call]]]:
    """Within it the calls of each place: an owner's function, as ("forward" of) a module.

    A wrapper stands on the instance meanwhile, so that no hook does: PyTorch's fused paths look for
    those. `keep` says whether the arguments are kept.
    """
    calls: dict[K, list[Call]] = {name: [] for name in places}

    def watch(name: K, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            made = Call(args, kwargs) if keep else Call((), {})
            calls[name].append(made)
            with dispatch.observed() as seen:
                result = call(*args, **kwargs)
            made.seen += seen
            return result

        vars(watched)[_WATCHES] = True
        return watched

    before = {name: vars(owner).get(attribute) for name, (owner, attribute) in places.items()}
    for name, (owner, attribute) in places.items():
        vars(owner)[attribute] = watch(name, getattr(owner, attribute))
    try:
        yield calls
    finally:
        for name, (owner, attribute) in places.items():
            if before[name] is None:
                vars(owner).pop(attribute, None)
            else:
                vars(owner)[attribute] = before[name]


def is_watched(module: nn.Module) -> bool:
    """Whether the forward on a module's instance is no other than its own, watched."""
    return hasattr(vars(module).get("forward"), _WATCHES)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Puts buffers (statistics of BatchNorm) and random generators back as they were."""
    tensors = {id(b): b for b in model.buffers() if b is not None}
    kept = [(buffer, buffer.detach().clone()) for buffer in tensors.values()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in kept:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
