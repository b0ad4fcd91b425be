"""A GRU as ONNX has it: one operator, gates z, r, h, the reset after the recurrent product."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels.ops.gru.problem import PER_DIRECTION


def gru(x: Tensor, h0: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """The registered operation's arguments: weights, biases, lengths, reverse."""
    *weights, lengths, reverse = rest
    direction = "reverse" if reverse else "forward"
    state = None if h0 is None else h0.unsqueeze(0)
    y, h_n = _operator(x, state, [weights], lengths, direction)
    return y.squeeze(1), h_n.squeeze(0)


def gru_bidirectional(x: Tensor, h0: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """The registered operation's arguments: weights and biases of each direction, lengths."""
    *weights, lengths = rest
    directions = [weights[:PER_DIRECTION], weights[PER_DIRECTION:]]
    y, h_n = _operator(x, h0, directions, lengths, "bidirectional")
    return y.transpose(1, 2).flatten(2), h_n


def _operator(
    x: Tensor,
    h0: Tensor | None,
    directions: Sequence[Sequence[Any]],
    lengths: Tensor | None,
    direction: str,
) -> tuple[Tensor, Tensor]:
    """x [T, B, C], h0 [directions, B, H] -> y [T, directions, B, H] and h_n, shaped as h0."""
    steps, batch, _ = x.shape
    count, hidden = len(directions), directions[0][1].size(1)
    if lengths is not None:
        lengths = lengths.clamp(0, steps)
    biases = None
    if directions[0][2] is not None:
        biases = torch.stack([torch.cat([_zrh(d[2]), _zrh(d[3])]) for d in directions])
    y, h_n = torch.onnx.ops.symbolic_multi_out(
        "GRU",
        (
            x,
            torch.stack([_zrh(d[0]) for d in directions]),
            torch.stack([_zrh(d[1]) for d in directions]),
            biases,
            None if lengths is None else lengths.to(torch.int32),
            h0,
        ),
        {"direction": direction, "hidden_size": hidden, "linear_before_reset": 1},
        dtypes=(x.dtype, x.dtype),
        shapes=((steps, count, batch, hidden), (count, batch, hidden)),
    )
    if lengths is not None:
        started = (lengths > 0).unsqueeze(1)  # a row of length 0 rests in h0
        h_n = torch.where(started, h_n, torch.zeros_like(h_n) if h0 is None else h0)
    return y, h_n


def _zrh(weight: Tensor) -> Tensor:
    """Rows of the gates r, z, n in ONNX's order."""
    r, z, n = weight.chunk(3)
    return torch.cat([z, r, n])
