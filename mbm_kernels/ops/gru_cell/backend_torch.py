"""The fastest PyTorch baseline: aten::gru_cell."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_kernels._core.problem import derived
from mbm_kernels._core.tracing import in_functorch
from mbm_kernels.ops.gru_cell.composite import composite
from mbm_kernels.ops.gru_cell.problem import Problem


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return None


def fwd(p: Problem, x: Tensor, h: Tensor, *rest: Any) -> tuple[Tensor, None]:
    *weights, _save = rest
    if derived(p, "torch composed", _is_composed):
        w_ih, w_hh, b_ih, b_hh = weights
        return composite(F.linear(x, w_ih, b_ih), h, w_hh, b_hh), None
    return torch.gru_cell(x, h, *weights), None


def _is_composed(p: Problem) -> bool:
    """Whether the step is made of differentiable parts: aten::gru_cell has no batching rule. A
    problem that plain calls share is none of functorch's."""
    return in_functorch()
