"""The problem descriptor of cross-entropy over a linear head."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mbm_kernels._core import checks
from mbm_kernels._core.problem import Problems
from mbm_kernels.ops.linear_head import head, targets

NAME = "linear_cross_entropy"


class Options(NamedTuple):
    """In the order of the schema."""

    ignore_index: int
    label_smoothing: float
    softcap: float | None
    z_loss: float
    reduction: str


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """What follows from the shapes, strides, dtypes and options of a call on rows [N, H]."""

    options: Options
    device: torch.device
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...] | None, ...]  # of hidden, weight and bias
    loss_shape: tuple[int, ...]
    sizes: dict[str, int]
    derived: dict[Any, Any] = field(default_factory=dict)  # by backends, under keys of their own

    @property
    def makes_gradients(self) -> bool:
        """Whether a forward can: without reduction each row's is known only in the backward."""
        return self.options.reduction != "none"


def build(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *options: Any
) -> Problem:
    """The problem of arguments in the registered operation's form, shapes checked."""
    checks.tensor(NAME, "hidden", hidden, 2)
    classes, features = head.check(NAME, hidden, weight, bias)
    targets.check_kind(NAME, target, hidden.shape[:1], hidden)
    rows, given = hidden.size(0), Options(*options)
    return Problem(
        options=given,
        device=hidden.device,
        dtype=hidden.dtype,
        shapes=((rows, features), (classes, features), None if bias is None else (classes,)),
        loss_shape=(rows,) if given.reduction == "none" else (),
        sizes={"N": rows, "H": features, "V": classes, "products": rows * features * classes},
    )


PROBLEMS: Problems[Problem] = Problems(build, inputs=4)
find = PROBLEMS.find
