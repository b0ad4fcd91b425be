"""The backward of every backend: decoding has none, so it is plain torch with [R, V] in memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels.ops.linear_head import matmul
from mbm_kernels.ops.linear_topk.problem import Problem


def bwd(
    p: Problem,
    grads: Sequence[Tensor | None],
    tensors: Sequence[Any],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    hidden, weight, bias = tensors
    grad_values, (ids,) = grads[0], saved
    if grad_values is None:
        grad_values = hidden.new_zeros(ids.shape)
    grad = grad_values.float()
    logits = matmul.product(hidden, weight.t())  # float32 [R, V]
    if bias is not None:
        logits += bias
    by_logits = torch.softmax(logits, -1).mul_(-grad.sum(-1, keepdim=True))
    by_logits.scatter_add_(1, ids, grad)
    rounded = by_logits.to(hidden.dtype)
    return (
        torch.mm(rounded, weight) if needs[0] else None,
        torch.mm(rounded.t(), hidden) if needs[1] else None,
        by_logits.sum(0).to(hidden.dtype) if needs[2] and bias is not None else None,
    )
