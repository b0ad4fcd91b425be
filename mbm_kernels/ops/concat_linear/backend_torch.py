"""The best stock form: one product per run of equal leading dimensions, summed by broadcasting."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_kernels._core.op import in_functorch


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return None


def fwd(inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    runs = _runs(inputs)
    joined = [run[0] if len(run) == 1 else torch.cat(run, -1) for run in runs]
    if len(joined) == 1:
        return F.linear(joined[0], weight, bias)
    weights = torch.split(weight, [x.size(-1) for x in joined], -1)
    # A product of the full shape first, so that the others can be added in place.
    leading = torch.broadcast_shapes(*(x.shape[:-1] for x in joined))
    first = next((i for i, x in enumerate(joined) if x.shape[:-1] == leading), 0)
    y = F.linear(joined[first], weights[first], bias)
    for i, x in enumerate(joined):
        if i != first:
            part = F.linear(x, weights[i])
            # vmap cannot write a batched part into an unbatched sum.
            in_place = y.shape[:-1] == leading and not in_functorch()
            y = y.add_(part) if in_place else y + part
    return y


def _runs(inputs: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbours of equal leading dimensions together, all of one rank.

    Those are concatenated, since one product is no slower than two; what differs in which
    dimensions it repeats is multiplied before it is repeated (figures in README).
    """
    rank = max(x.dim() for x in inputs)
    runs: list[list[Tensor]] = []
    for x in inputs:
        x = x.reshape(*(1,) * (rank - x.dim()), *x.shape)
        if runs and runs[-1][0].shape[:-1] == x.shape[:-1]:
            runs[-1].append(x)
        else:
            runs.append([x])
    return runs
