"""The problem descriptor of cross attention."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import checks, masks
from mbm_kernels._core.problem import Problems

NAME = "cross_attention"
NEED_WEIGHTS = (None, "mean", "heads")


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """What follows from the shapes, strides, dtypes and options of a call."""

    scale: float
    need_weights: str | None
    device: torch.device
    dtype: torch.dtype
    B: int
    N: int
    T: int
    S: int
    D: int
    E: int
    strides: tuple[tuple[int, ...], ...]  # of query, key and value, as given
    dtypes: tuple[torch.dtype, ...]
    hiding: masks.Hiding  # of a floating mask, which is added to the scores, too
    sizes: dict[str, int]
    derived: dict[Any, Any] = field(default_factory=dict)  # by backends, under keys of their own

    @property
    def options(self) -> tuple[float, str | None]:
        return self.scale, self.need_weights

    @property
    def context_shape(self) -> tuple[int, ...]:
        return self.B, self.N, self.T, self.E

    @property
    def heads_shape(self) -> tuple[int, ...]:
        """Of the weights of each head."""
        return self.B, self.N, self.T, self.S

    @property
    def weights_shape(self) -> tuple[int, ...]:
        """Of the weights that are returned, where any are."""
        return (self.B, self.T, self.S) if self.need_weights == "mean" else self.heads_shape

    @property
    def saves_heads(self) -> bool:
        """Whether the forward keeps the weights of each head, float32, for the backward.

        It does while they take at most half the space of key and value; beyond, the backward
        computes them again. With need_weights="heads" they are an output anyway.
        """
        return self.need_weights != "heads" and 2 * self.T <= self.D + self.E


def check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    checks.tensor(NAME, "query", query, 4)
    checks.tensor(NAME, "key", key, 4)
    checks.tensor(NAME, "value", value, 4)
    batch, heads, _, features = query.shape
    positions = key.size(2)
    checks.shape(NAME, "key", key, "B, N, S, D", (batch, heads, positions, features))
    checks.shape(NAME, "value", value, "B, N, S, E", (batch, heads, positions, value.size(3)))


def check_hiding(
    query: Tensor, key: Tensor, key_lengths: Tensor | None, mask: Tensor | None
) -> None:
    shape = (*query.shape[:3], key.size(2))
    masks.check(NAME, key_lengths, mask, query, "B, N, T, S", shape, floating=True)


def sizes_of(sizes: Sequence[int], need_weights: str | None, masked: bool) -> dict[str, int]:
    """What dispatch judges by, of B, N, T, S, D and E."""
    named = dict(zip("BNTSDE", sizes, strict=True))
    named["elements"] = math.prod(sizes[:5])
    return {**named, "weights": int(need_weights is not None), "masked": int(masked)}


def build(*args: Any) -> Problem:
    """The problem of the registered operation's inputs and options.

    Raises:
        TypeError, ValueError: the tensors do not fit together.
    """
    *given, key_lengths, mask, scale, need_weights = args
    query, key, value = given
    check_shapes(query, key, value)
    check_hiding(query, key, key_lengths, mask)
    B, N, T, D = query.shape
    S, E = key.size(2), value.size(3)
    masked = mask is not None or key_lengths is not None
    return Problem(
        scale=scale,
        need_weights=need_weights,
        device=query.device,
        dtype=query.dtype,
        B=B,
        N=N,
        T=T,
        S=S,
        D=D,
        E=E,
        strides=tuple(x.stride() for x in given),
        dtypes=tuple(x.dtype for x in given),
        hiding=masks.Hiding.of(key_lengths, mask),
        sizes=sizes_of((B, N, T, S, D, E), need_weights, masked),
    )


PROBLEMS: Problems[Problem] = Problems(build, inputs=5)
find = PROBLEMS.find
