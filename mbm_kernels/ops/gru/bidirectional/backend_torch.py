"""The stock form of each direction."""

from typing import Any

from torch import Tensor

from mbm_kernels.ops.gru.bidirectional.by_direction import by_direction


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
) -> tuple[Tensor, Tensor, None]:
    reverse = w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse
    y, h_n = by_direction(x, h0, (w_ih, w_hh, b_ih, b_hh), reverse, lengths, "torch")
    return y, h_n, None
