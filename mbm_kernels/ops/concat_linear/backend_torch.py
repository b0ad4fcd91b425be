"""The best stock form: one product per run of equal leading dimensions, summed by broadcasting."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_kernels._core.op import in_functorch


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return None


def fwd(inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    rank = max(x.dim() for x in inputs)
    aligned = [x.reshape(*(1,) * (rank - x.dim()), *x.shape) for x in inputs]
    # Inputs that differ in what they repeat are multiplied before they are repeated; neighbours
    # that do not are concatenated, since one product is no slower than two (README).
    runs = [list(run) for _, run in itertools.groupby(aligned, key=lambda x: tuple(x.shape[:-1]))]
    joined = [run[0] if len(run) == 1 else torch.cat(run, -1) for run in runs]
    if len(joined) == 1:
        return F.linear(joined[0], weight, bias)
    weights = weight.split([x.size(-1) for x in joined], -1)
    # The largest first, so that the others can be added in place.
    pairs = sorted(
        zip(joined, weights, strict=True), key=lambda pair: -math.prod(pair[0].shape[:-1])
    )
    leading = torch.broadcast_shapes(*(x.shape[:-1] for x in joined))
    y = F.linear(pairs[0][0], pairs[0][1], bias)
    for x, w in pairs[1:]:
        part = F.linear(x, w)
        # vmap cannot write a batched part into an unbatched sum.
        in_place = y.shape[:-1] == leading and not in_functorch()
        y = y.add_(part) if in_place else y + part
    return y
