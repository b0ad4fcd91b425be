"""The fastest PyTorch baseline: one GEMM over the rows that count, then F.cross_entropy.

F.linear_cross_entropy of torch 2.13 is the same two calls without `options`. Its chunked form is
no candidate: it refuses second derivatives and compilation, and at N 256, H 256, V 10000 it takes
188 ms where this takes 71 (forward and backward, one thread of an AMD EPYC).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_kernels.ops.linear_cross_entropy.problem import Problem
from mbm_kernels.ops.linear_head import targets


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return None


def fwd(
    p: Problem,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    save: Sequence[bool] = (),
) -> tuple[Tensor]:
    ignore_index, label_smoothing, softcap, z_loss, reduction = p.options
    # 40 % of the rows ignored: 74 ms -> 46 ms at N 256, H 256, V 10000.
    rows = targets.Rows(target, ignore_index, weight.size(0))
    logits = F.linear(rows.of(hidden), weight, bias)  # [M, V]
    if logits.dtype != torch.float64:
        logits = logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = rows.cross_entropy(logits, reduction, label_smoothing)
    if z_loss != 0:
        loss = loss + z_loss * rows.reduce(torch.logsumexp(logits, -1).square(), reduction)
    return (loss,)
