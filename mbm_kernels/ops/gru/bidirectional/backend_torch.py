"""The stock form of each direction."""

from typing import Any

from torch import Tensor

from mbm_kernels.ops.gru.bidirectional.by_direction import by_direction
from mbm_kernels.ops.gru.problem import Problem


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return None


def fwd(p: Problem, *given: Any) -> tuple[Tensor, Tensor, None]:
    *tensors, _save = given
    return *by_direction(tensors, "torch"), None
