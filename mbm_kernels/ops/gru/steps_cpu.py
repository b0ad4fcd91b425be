"""A sequence of few steps by csrc/gru_cell, step by step.

That kernel reads the weights as they are. What a longer sequence wins by packed weights, this one
would lose: to hash them, so that a packed form may be trusted, takes as long as a step. With
gradients, and without lengths, a sequence of one step runs so.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import native
from mbm_kernels.ops.gru_cell import precision

# More than one step only where a step is bound by reading weights from beyond a core's own cache.
MOST_STEPS, FEW_ROWS, MANY_WEIGHTS = 3, 4, 1 << 17


def take(steps: int, batch: int, features: int, hidden: int, saved: bool) -> bool:
    """Whether a sequence runs this way; `saved`: with what a backward needs."""
    few = steps <= MOST_STEPS and batch <= FEW_ROWS and not saved
    return steps == 1 or (few and 3 * hidden * (features + hidden) >= MANY_WEIGHTS)


def run(
    step: bytes,
    x: Tensor,
    h0: Tensor | None,
    weights: Sequence[Tensor | None],
    lengths: Tensor | None,
    reverse: bool,
    reserve: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One direction: y [T, B, H] and h_n [B, H].

    x [T, B, C] and h0 are float32. reserve: [B, 4H], written, of one step without lengths.
    """
    w_ih, w_hh, b_ih, b_hh = weights
    assert w_ih is not None
    assert w_hh is not None
    steps, batch, hidden = x.size(0), x.size(1), w_hh.size(1)
    held = (precision.plain(w_ih), precision.plain(w_hh), native.dense(b_ih), native.dense(b_hh))
    addresses = native.addresses(held)
    h = _state(h0, batch, hidden)
    y = native.empty((steps, batch, hidden))
    forward, threads = native.cpu().gru_cell_forward, torch.get_num_threads()
    state, x_at, y_at, saved = h.data_ptr(), x.data_ptr(), y.data_ptr(), native.address(reserve)
    x_step, y_step = 4 * x.stride(0), 4 * batch * hidden
    for t in range(steps - 1, -1, -1) if reverse else range(steps):
        made = y_at + t * y_step
        forward(step, (x_at + t * x_step, state, *addresses), (made, saved), threads)
        state = made
        if lengths is not None:
            valid = (lengths > t)[:, None]
            h = torch.where(valid, y[t], h)
            y[t].masked_fill_(~valid, 0)
            state = h.data_ptr()
    if lengths is None and steps > 0:
        h = y[0 if reverse else -1]
    return y, h.clone()


def both(
    step: bytes,
    x: Tensor,
    h0: Tensor | None,
    by_direction: Sequence[Sequence[Any]],
    lengths: Tensor | None,
    reserve: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both directions: y [T, B, 2H] and h_n [2, B, H]; reserve: [2, B, 4H]."""
    runs = [
        run(step, x, state, weights, lengths, reverse, saved)
        for state, weights, reverse, saved in zip(
            _each(h0), by_direction, (False, True), _each(reserve), strict=True
        )
    ]
    return torch.cat([y for y, _ in runs], -1), torch.stack([h_n for _, h_n in runs])


def gradients(
    step: bytes,
    x: Tensor,
    h0: Tensor | None,
    weights: Sequence[Tensor],
    reserve: Tensor,
    grad: Tensor,
    found: Sequence[Tensor | None],
) -> None:
    """Of one step in one direction: writes those of x, h0, weights and biases that are not None.

    reserve: [B, 4H]; grad: of the state after the step, [B, H]; both are dense float32.
    """
    w_ih, w_hh, *_ = weights
    h = _state(h0, *grad.shape)
    given = (x, h, precision.plain(w_ih), precision.plain(w_hh), reserve, grad)
    native.cpu().gru_cell_backward(
        step, native.addresses(given), native.addresses(found), torch.get_num_threads()
    )


def _state(h0: Tensor | None, batch: int, hidden: int) -> Tensor:
    return native.empty((batch, hidden)).zero_() if h0 is None else h0


def _each(tensor: Tensor | None) -> Sequence[Tensor | None]:
    """Of both directions."""
    return (None, None) if tensor is None else tuple(tensor)
