"""Gradients of plain torch code, by torch's own autograd."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core.arguments import as_tuple
from mbm_kernels._core.tracing import in_functorch


def gradients(
    fn: Callable[..., Any],
    args: Sequence[Any],
    diff: Sequence[int],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
    create_graph: bool,
) -> list[Tensor | None]:
    """Gradients of fn(*args) by torch's autograd, with respect to args[i] for i in `diff`.

    The function runs on aliases: an argument may be computed from another, and only the direct
    dependence counts.
    """
    places: list[tuple[int, int | None]] = []  # position, and index where that is a list
    for position, needed in zip(diff, needs, strict=True):
        arg = args[position]
        if isinstance(arg, (list, tuple)) and needed:
            places.extend((position, i) for i in range(len(arg)))
        elif isinstance(arg, Tensor) and needed:
            places.append((position, None))
    wanted = [args[p] if i is None else args[p][i] for p, i in places]

    def call(*values: Tensor) -> list[Tensor]:
        inner = [list(a) if isinstance(a, (list, tuple)) else a for a in args]
        for (position, i), value in zip(places, values, strict=True):
            if i is None:
                inner[position] = value
            else:
                inner[position][i] = value
        outputs = as_tuple(fn(*inner))
        return [o for o, grad in zip(outputs, grads, strict=False) if grad is not None]

    given = [grad for grad in grads if grad is not None]
    if in_functorch():
        # A backward may run after its grad level has ended (jacrev): autograd.grad would see no
        # graph there.
        outputs, pull, *_ = torch.func.vjp(call, *wanted)
        return list(pull([g.to(o.dtype) for o, g in zip(outputs, given, strict=True)]))
    with torch.enable_grad():
        aliases = [x.view_as(x) if create_graph else x.detach().requires_grad_() for x in wanted]
        pairs = [(o, g) for o, g in zip(call(*aliases), given, strict=True) if o.requires_grad]
        if not pairs:
            return [torch.zeros_like(alias) for alias in aliases]
        flat = torch.autograd.grad(
            [output for output, _ in pairs],
            aliases,
            [grad.to(output.dtype) for output, grad in pairs],
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    return list(flat)
