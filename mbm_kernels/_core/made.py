"""Gradients that a forward makes for a gradient of 1 (see op.py), handed out by the backward."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core.tracing import graph_is_kept, is_plain

Named = dict[str, Any]


def are_made(
    diff: Sequence[str], named: Named, given: Sequence[Tensor | None], needs: Sequence[bool]
) -> bool:
    """Whether they are all that is asked for; `given` are the gradients of the public outputs."""
    if given[0] is None or any(grad is not None for grad in given[1:]):
        return False
    for name, needed in zip(diff, needs, strict=True):
        if needed and named[name] is not None:
            made = named[f"made_{name}"]
            if made is None or made.shape != named[name].shape:
                return False
    return True


def scaled(
    diff: Sequence[str],
    named: Named,
    grad: Tensor,
    needs: Sequence[bool],
    ignored: Callable[[Named], Tensor] | None,
) -> list[Tensor | None]:
    """Times `grad`, a scalar; rows of the first that are `ignored` stay 0 whatever it is."""
    found: list[Tensor | None] = []
    on_cpu = grad.device.type == "cpu"
    value: float | None = None  # reading it costs 1 us
    for name, needed in zip(diff, needs, strict=True):
        if not needed or named[name] is None:
            continue
        made, dtype = named[f"made_{name}"], named[name].dtype
        plain = is_plain([made, grad])
        if plain and on_cpu and value is None:
            value = float(grad.item())
        factor = grad
        if ignored is not None and name == diff[0] and not (plain and on_cpu and _finite(value)):
            factor = torch.where(ignored(named), 0.0, grad).unsqueeze(1)
        if plain and not on_cpu and dtype != made.dtype:
            # Scaled and rounded in one pass: 30 MB instead of 70 at V 10000, H 512.
            made = torch.mul(made, factor, out=torch.empty_like(made, dtype=dtype))
        elif plain and not graph_is_kept():
            # A graph that is freed gives away what it saved: a second [V, H] would be felt.
            if value != 1:
                made.mul_(factor)
        else:
            made = made * factor
        found.append(made if made.dtype is dtype else made.to(dtype))
    return found


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
