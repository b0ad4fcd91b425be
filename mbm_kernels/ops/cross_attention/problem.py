"""The problem descriptor of cross attention."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import checks
from mbm_kernels._core.problem import Calls, Problems, key_of

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
    mask_shape: tuple[int, ...] | None
    mask_strides: tuple[int, ...] | None
    mask_dtype: torch.dtype | None  # bool: True = attend; floating: added to the scores
    has_lengths: bool
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


PROBLEMS: Problems[Problem] = Problems()
CALLS: Calls[Problem] = Calls()


def find(*args: Any) -> Problem:
    """The problem of the registered operation's inputs and options."""
    *tensors, scale, need_weights = args
    key = key_of(tensors, ("explicit", scale, need_weights))
    found = PROBLEMS.get(key)
    if found is None:
        check(*tensors)
        found = PROBLEMS.put(key, build(tensors, scale, need_weights))
    return found


def check(
    query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None, mask: Tensor | None
) -> None:
    """Whether the tensors fit together; neither their floating dtypes nor any value.

    Raises:
        TypeError: an argument is not a tensor of the right kind.
        ValueError: shapes or devices do not fit.
    """
    check_shapes(query, key, value)
    check_hiding(query, key, key_lengths, mask)


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
    if key_lengths is not None:
        checks.lengths_kind(NAME, "key_lengths", key_lengths, query.size(0), query)
    if mask is not None:
        shape = (*query.shape[:3], key.size(2))
        checks.mask(NAME, "mask", mask, "B, N, T, S", shape, floating=True)
        checks.same_device(NAME, "mask", mask, "query", query)


def build(tensors: Any, scale: float, need_weights: str | None) -> Problem:
    """The problem of tensors that `check` let pass."""
    *given, key_lengths, mask = tensors
    query, key, value = given
    B, N, T, D = query.shape
    S, E = key.size(2), value.size(3)
    sizes = {"B": B, "N": N, "T": T, "S": S, "D": D, "E": E, "elements": B * N * T * S * D}
    sizes["weights"] = int(need_weights is not None)
    sizes["masked"] = int(mask is not None or key_lengths is not None)
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
        mask_shape=None if mask is None else tuple(mask.shape),
        mask_strides=None if mask is None else mask.stride(),
        mask_dtype=None if mask is None else mask.dtype,
        has_lengths=key_lengths is not None,
        sizes=sizes,
    )
