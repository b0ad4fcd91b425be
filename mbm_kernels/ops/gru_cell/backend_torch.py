"""The fastest PyTorch baseline: aten::gru_cell."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_kernels._core.tracing import in_functorch
from mbm_kernels.ops.gru_cell.composite import composite


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return None


def fwd(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    save: bool,
) -> tuple[Tensor, None]:
    if in_functorch():
        return composite(F.linear(x, w_ih, b_ih), h, w_hh, b_hh), None
    return torch.gru_cell(x, h, w_ih, w_hh, b_ih, b_hh), None
