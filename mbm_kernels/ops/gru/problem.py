"""The problem descriptor of a GRU over a sequence, of one direction or of both."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import checks
from mbm_kernels._core.problem import Problems
from mbm_kernels.ops.gru_cell.problem import check_weights

NAME = "gru"
PER_DIRECTION = 4  # weights and biases


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """What follows from the shapes, strides, dtypes and options of a call.

    Of two directions the first runs forwards, the second in reverse, and every array but x, the
    weights and their gradients holds both.
    """

    directions: int
    reverse: bool
    device: torch.device
    dtype: torch.dtype
    x_shape: tuple[int, ...]  # [T, B, C]
    x_strides: tuple[int, ...]
    hidden: int
    sizes: dict[str, int]
    derived: dict[Any, Any] = field(default_factory=dict)  # by backends, under keys of their own

    @property
    def options(self) -> tuple[Any, ...]:
        """As the registered operation takes them."""
        return (self.reverse,) if self.directions == 1 else ()

    @property
    def state_shape(self) -> tuple[int, ...]:
        return result_shapes(self.directions, self.x_shape, self.hidden)[1]


def result_shapes(
    directions: int, x_shape: Sequence[int], hidden: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of y, h_n and reserve."""
    steps, batch, _ = x_shape
    each = () if directions == 1 else (directions,)
    y = (steps, batch, directions * hidden)
    return y, (*each, batch, hidden), (*each, steps, batch, 4 * hidden)


def describe(op: str, tensors: Sequence[Any], directions: int, reverse: bool) -> Problem:
    """The problem of tensors in the order of the registered operation, which it checks.

    Raises:
        TypeError, ValueError: shapes do not fit.
    """
    check_shapes(op, tensors, directions)
    x, hidden = tensors[0], tensors[3].size(1)
    steps, batch, features = x.shape
    return Problem(
        directions=directions,
        reverse=reverse,
        device=x.device,
        dtype=x.dtype,
        x_shape=tuple(x.shape),
        x_strides=x.stride(),
        hidden=hidden,
        sizes={"T": steps, "B": batch, "C": features, "H": hidden},
    )


def build(*given: Any) -> Problem:
    """The problem of x, h0, weights and biases, lengths and `reverse`."""
    *tensors, reverse = given
    return describe(NAME, tensors, 1, reverse)


def check_shapes(op: str, tensors: Sequence[Any], directions: int) -> None:
    """Whether the shapes of all but the lengths fit."""
    x, h0, *weights, _lengths = tensors
    checks.tensor(op, "x", x, 3)
    checks.tensor(op, "w_hh", weights[1], 2)
    _, batch, features = x.shape
    hidden = weights[1].size(1)
    for first in range(0, len(weights), PER_DIRECTION):
        check_weights(op, weights[first : first + PER_DIRECTION], features, hidden)
    if h0 is not None and directions == 1:
        checks.tensor(op, "h0", h0, 2)
        checks.shape(op, "h0", h0, "B, H", (batch, hidden))
    elif h0 is not None:
        checks.tensor(op, "h0", h0, 3)
        checks.shape(op, "h0", h0, "2, B, H", (2, batch, hidden))


def check_lengths(op: str, x: Tensor, lengths: Tensor | None) -> None:
    """Their values too, which no problem tells of: at each call."""
    if lengths is not None:
        steps, batch, _ = x.shape
        checks.lengths(op, "lengths", lengths, batch, steps, "T", x)


def fake(directions: int, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Results of the registered operation's arguments."""
    x, w_hh, save = given[0], given[3], given[-1]
    y, h_n, reserve = result_shapes(directions, x.shape, w_hh.size(1))
    return x.new_empty(y), x.new_empty(h_n), x.new_empty(reserve if save else (0,))


PROBLEMS: Problems[Problem] = Problems(build, inputs=7)
find = PROBLEMS.find
