"""A sequence of few steps in inference, by csrc/gru_cell step by step.

That kernel reads the weights as they are. What a longer sequence wins by packed weights, this one
would lose: to hash them, so that a packed form may be trusted, takes as long as a step.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import native
from mbm_kernels.ops.gru_cell import backend_cpu, precision

# More than one step only where a step is bound by reading weights from beyond a core's own cache.
MOST_STEPS, FEW_ROWS, MANY_WEIGHTS = 3, 4, 1 << 17


def take(steps: int, batch: int, features: int, hidden: int) -> bool:
    """Whether a sequence without gradients runs this way."""
    few = steps <= MOST_STEPS and batch <= FEW_ROWS
    return steps == 1 or (few and 3 * hidden * (features + hidden) >= MANY_WEIGHTS)


def block(batch: int, features: int, hidden: int, row_stride: int) -> bytes:
    """The argument block of one step, whose rows of x lie so far apart."""
    values = {"B": batch, "C": features, "H": hidden, "x_b": row_stride}
    return native.block(backend_cpu._fields(), values)


def run(
    step: bytes,
    x: Tensor,
    h0: Tensor | None,
    weights: Sequence[Tensor | None],
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """One direction: y [T, B, H] and h_n [B, H]. x [T, B, C] and h0 are float32."""
    w_ih, w_hh, *biases = weights
    assert w_ih is not None
    assert w_hh is not None
    steps, batch, hidden = x.size(0), x.size(1), w_hh.size(1)
    held = (precision.plain(w_ih), precision.plain(w_hh), *map(native.dense, biases))
    addresses = native.addresses(held)
    h = native.empty((batch, hidden)).zero_() if h0 is None else h0
    y = native.empty((steps, batch, hidden))
    forward, threads = native.cpu().gru_cell_forward, torch.get_num_threads()
    for t in reversed(range(steps)) if reverse else range(steps):
        made = y[t]
        forward(step, (x[t].data_ptr(), h.data_ptr(), *addresses), (made.data_ptr(), 0), threads)
        if lengths is None:
            h = made
            continue
        valid = (lengths > t)[:, None]
        h = torch.where(valid, made, h)
        made.masked_fill_(~valid, 0)
    return y, h.clone() if lengths is None else h


def both(
    step: bytes,
    x: Tensor,
    h0: Tensor | None,
    by_direction: Sequence[Sequence[Any]],
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Both directions: y [T, B, 2H] and h_n [2, B, H]."""
    states = (None, None) if h0 is None else h0
    runs = [
        run(step, x, state, weights, lengths, reverse=reverse)
        for state, weights, reverse in zip(states, by_direction, (False, True), strict=True)
    ]
    return torch.cat([y for y, _ in runs], -1), torch.stack([h_n for _, h_n in runs])
