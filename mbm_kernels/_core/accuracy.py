"""How large an error may be: the numbers of the rule that `mbm_kernels.testing.errors` states."""

from dataclasses import dataclass

import torch
from torch import Tensor

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
FLOOR_EPS = 4.0


def max_abs(value: Tensor) -> float:
    """The largest absolute value, 0 for an empty tensor; NaN and infinities are left out."""
    finite = value.detach().double()
    finite = finite[torch.isfinite(finite)]
    return float(finite.abs().max()) if finite.numel() else 0.0


@dataclass(frozen=True)
class Budget:
    """The error that a result may have."""

    factor: float
    yardstick: float
    floor: float

    @property
    def limit(self) -> float:
        return self.factor * self.yardstick + self.floor
