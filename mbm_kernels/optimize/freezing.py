"""Weights taken for constants, as a change that can be undone."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from mbm_kernels._core import packing


@dataclass(eq=False)
class Frozen:
    """The tensors of modules that were replaced."""

    tensors: list[Tensor] = field(repr=False)
    name: str = "(weights)"

    def why_not_undone(self) -> str | None:
        return None

    def undo(self) -> None:
        packing.thaw(self.tensors)

    def redo(self) -> None:
        packing.freeze(self.tensors)
