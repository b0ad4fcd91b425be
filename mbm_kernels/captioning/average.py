"""An exponential moving average (EMA) of the weights, which is what is evaluated and saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mbm_kernels.captioning.parallel import local


class Average:
    """average = d average + (1 - d) weights after each step.

    d is `decay`, at step n no more than (1 + n) / (10 + n), so that the first weights are soon
    forgotten.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.values = {name: x.detach().clone() for name, x in parameters.items()}

    def update(self, step: int) -> None:
        """After step number `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            averages = [local(x) for x in self.values.values()]
            now = [local(x.detach()) for x in self.parameters.values()]
            get_ema_multi_avg_fn(decay)(averages, now, None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters are the average within the context, and afterwards as before, by bits."""
        kept = {name: x.detach().clone() for name, x in self.parameters.items()}
        self._copy(self.values)
        try:
            yield
        finally:
            self._copy(kept)

    def apply(self) -> None:
        """The parameters become the average."""
        self._copy(self.values)

    @torch.no_grad()
    def _copy(self, values: Mapping[str, Tensor]) -> None:
        for name, x in self.parameters.items():
            x.copy_(values[name])
