"""The problem descriptor of additive attention."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import checks, masks
from mbm_kernels._core.problem import Problems

NAME = "additive_attention"


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """What follows from the shapes, strides and dtypes of a call; there are no options."""

    device: torch.device
    dtype: torch.dtype
    B: int
    T: int
    S: int
    D: int
    E: int
    # Of query, key, value and v, as given; a key that is a snapshot may be float32 beside others.
    strides: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    hiding: masks.Hiding
    sizes: dict[str, int]
    derived: dict[Any, Any] = field(default_factory=dict)  # by backends, under keys of their own

    @property
    def options(self) -> tuple[()]:
        return ()

    @property
    def context_shape(self) -> tuple[int, int, int]:
        return self.B, self.T, self.E

    @property
    def weights_shape(self) -> tuple[int, int, int]:
        return self.B, self.T, self.S


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    mask: Tensor | None,
) -> None:
    """Whether the tensors fit together; neither their floating dtypes nor any value.

    Raises:
        TypeError: an argument is not a tensor of the right kind.
        ValueError: shapes or devices do not fit.
    """
    checks.tensor(NAME, "query", query, 3)
    checks.tensor(NAME, "key", key, 3)
    checks.tensor(NAME, "value", value, 3)
    checks.tensor(NAME, "v", v, 1)
    batch, steps, features = query.shape
    positions = key.size(1)
    checks.shape(NAME, "key", key, "B, S, D", (batch, positions, features))
    checks.shape(NAME, "value", value, "B, S, E", (batch, positions, value.size(2)))
    checks.shape(NAME, "v", v, "D", (features,))
    masks.check(NAME, key_lengths, mask, query, "B, T, S", (batch, steps, positions))


def build(*tensors: Any) -> Problem:
    """The problem of tensors that it checks."""
    check(*tensors)
    *floating, key_lengths, mask = tensors
    query, key, value, _ = floating
    B, T, D = query.shape
    S, E = key.size(1), value.size(2)
    return Problem(
        device=query.device,
        dtype=query.dtype,
        B=B,
        T=T,
        S=S,
        D=D,
        E=E,
        strides=tuple(x.stride() for x in floating),
        dtypes=tuple(x.dtype for x in floating),
        hiding=masks.Hiding.of(key_lengths, mask),
        sizes={"B": B, "T": T, "S": S, "D": D, "E": E, "elements": B * T * S * D},
    )


PROBLEMS: Problems[Problem] = Problems(build, inputs=6)
find = PROBLEMS.find
