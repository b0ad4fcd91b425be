"""The problem descriptor of the k likeliest classes of a linear head."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import checks
from mbm_kernels._core.problem import Problems
from mbm_kernels.ops.linear_head import head

NAME = "linear_topk"


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """What follows from the shapes, strides, dtypes and k of a call on rows [R, H]."""

    k: int
    device: torch.device
    dtype: torch.dtype
    hidden_strides: tuple[int, ...]
    out_shape: tuple[int, int]  # of values and ids
    sizes: dict[str, int]
    derived: dict[Any, Any] = field(default_factory=dict)  # by backends, under keys of their own

    @property
    def options(self) -> tuple[int]:
        """As the registered operation takes them."""
        return (self.k,)


def build(hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> Problem:
    """The problem of arguments in the registered operation's form, shapes checked."""
    checks.tensor(NAME, "hidden", hidden, 2)
    classes, features = head.check(NAME, hidden, weight, bias)
    check_k(k, classes)
    rows = hidden.size(0)
    return Problem(
        k=k,
        device=hidden.device,
        dtype=hidden.dtype,
        hidden_strides=hidden.stride(),
        out_shape=(rows, k),
        sizes={"R": rows, "H": features, "V": classes, "k": k},
    )


def check_k(k: Any, classes: int) -> None:
    if not isinstance(k, int) or not 1 <= k <= classes:
        checks.fail(NAME, "k", repr(k), f"1 <= k <= V = {classes}", "ask for fewer classes")


PROBLEMS: Problems[Problem] = Problems(build, inputs=3)
find = PROBLEMS.find
