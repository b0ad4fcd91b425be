"""The stock form of each direction."""

from typing import Any

import torch
from torch import Tensor

from mbm_kernels.ops.gru_bidirectional.by_direction import by_direction


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return None


def fwd(
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_ih_reverse: Tensor,
    w_hh_reverse: Tensor,
    b_ih_reverse: Tensor | None,
    b_hh_reverse: Tensor | None,
    lengths: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    reverse = w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse
    y, h_n = by_direction(x, h0, (w_ih, w_hh, b_ih, b_hh), reverse, lengths, "torch")
    # Autograd keeps what it needs; the registered op must return what its fake kernel announces.
    keep = save and not torch.is_grad_enabled()
    return y, h_n, x.new_zeros((2, *x.shape[:2], 4 * w_hh.size(1)) if keep else 0)
