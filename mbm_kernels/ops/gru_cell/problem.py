"""The problem descriptor of a GRU's step, and what every GRU's weights are."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mbm_kernels._core import checks
from mbm_kernels._core.problem import Problems

NAME = "gru_cell"
WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh")
WEIGHT_TYPES = ", ".join(f"Tensor{'?' * (n[0] == 'b')} {n}" for n in WEIGHTS)  # for schemas


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """What follows from the shapes, strides and dtypes of a call."""

    device: torch.device
    dtype: torch.dtype
    x_shape: tuple[int, ...]  # [B, C]
    x_strides: tuple[int, ...]
    hidden: int
    sizes: dict[str, int]
    derived: dict[Any, Any] = field(default_factory=dict)  # by backends, under keys of their own

    @property
    def options(self) -> tuple[Any, ...]:
        return ()

    @property
    def state_shape(self) -> tuple[int, int]:
        return self.x_shape[0], self.hidden

    @property
    def saved_shape(self) -> tuple[int, int]:
        """Of reserve."""
        return self.x_shape[0], 4 * self.hidden


def build(*tensors: Any) -> Problem:
    """The problem of x, h, w_ih, w_hh, b_ih and b_hh.

    Raises:
        TypeError, ValueError: shapes do not fit.
    """
    check(tensors)
    x, h = tensors[:2]
    batch, features = x.shape
    hidden = h.size(1)
    return Problem(
        device=x.device,
        dtype=x.dtype,
        x_shape=tuple(x.shape),
        x_strides=x.stride(),
        hidden=hidden,
        sizes={"B": batch, "C": features, "H": hidden},
    )


def check(tensors: Sequence[Any]) -> None:
    """Whether the shapes of a step's arguments fit."""
    x, h, *weights = tensors
    checks.tensor(NAME, "x", x, 2)
    checks.tensor(NAME, "h", h, 2)
    batch, features = x.shape
    hidden = h.size(1)
    checks.shape(NAME, "h", h, "B, H", (batch, hidden))
    check_weights(NAME, weights, features, hidden)


def check_weights(op: str, weights: Sequence[Any], features: int, hidden: int) -> None:
    """Those of `WEIGHTS`, of a GRU whose input has `features` and whose state has `hidden`."""
    w_ih, w_hh, *biases = weights
    checks.tensor(op, "w_ih", w_ih, 2)
    checks.tensor(op, "w_hh", w_hh, 2)
    checks.shape(op, "w_ih", w_ih, "3H, C", (3 * hidden, features))
    checks.shape(op, "w_hh", w_hh, "3H, H", (3 * hidden, hidden))
    if all(bias is None for bias in biases):
        return
    for name, bias in zip(("b_ih", "b_hh"), biases, strict=True):
        if bias is None:
            checks.fail(op, name, None, "both biases, or neither", "give a tensor of zeros")
        checks.tensor(op, name, bias, 1)
        checks.shape(op, name, bias, "3H", (3 * hidden,))


def weight_shapes(features: int, hidden: int) -> tuple[tuple[int, ...], ...]:
    """Of `WEIGHTS`."""
    gates = 3 * hidden
    return (gates, features), (gates, hidden), (gates,), (gates,)


PROBLEMS: Problems[Problem] = Problems(build, inputs=6)
find = PROBLEMS.find
