"""torch.compile with weights as constants, and the fastest of its matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mbm_kernels.engines.engine import Engine, Session
from mbm_kernels.engines.model import Model, flat

Function = Callable[..., Any]
MAX_AUTOTUNE = "max-autotune-no-cudagraphs"


def frozen(function: Function, mode: str | None = None, backend: str = "inductor") -> Function:
    """torch.compile that takes a module's parameters for constants, as inference may: it lays them
    out for oneDNN once and fuses what follows. For calls under torch.no_grad."""
    # One shape at a time: dynamic shapes would only slow it.
    compiled: Function = torch.compile(function, dynamic=False, mode=mode, backend=backend)
    is_compiled = False

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_compiled
        if is_compiled:
            return compiled(*args, **kwargs)
        from torch._inductor import config, select_algorithm

        # A table of candidates for each product that is tuned, on standard error
        tuner: Any = select_algorithm
        printing = getattr(tuner, "PRINT_AUTOTUNE", True)
        tuner.PRINT_AUTOTUNE = False
        try:
            with config.patch(freezing=True):
                found = compiled(*args, **kwargs)
        finally:
            tuner.PRINT_AUTOTUNE = printing
        is_compiled = True
        return found

    return call


class CompiledSession(Session):
    """A compiled module with its inputs; each call makes its outputs, as PyTorch's do."""

    def __init__(self, function: Function, inputs: tuple[Tensor, ...]):
        self._function, self._inputs = function, inputs
        self._last = self.run()

    def run(self) -> object:
        with torch.no_grad():
            return self._function(*self._inputs)

    def outputs(self) -> list[Tensor]:
        return flat(self.run())


class Inductor(Engine):
    """Its threads are PyTorch's."""

    name, package, module = "torch.compile max-autotune", "torch", "torch"
    pytorch = compiles = True

    def build(self, model: Model, threads: int) -> Session:
        return CompiledSession(frozen(model.module, MAX_AUTOTUNE), model.inputs)
