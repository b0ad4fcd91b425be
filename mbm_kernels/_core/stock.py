"""Calls of our modules that PyTorch's own forward serves, recognised at the cost of a few guards."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mbm_kernels._core import dispatch, problem, tracing


class StockCalls:
    """What a module knows of its latest calls whose choice was PyTorch.

    A call is one of them while its tensors are alike (problem.py says what a guard compares, of
    modes, autocast and gradients too), its options are equal and nothing that the choice goes by
    has changed. Copies and pickles of a module know nothing.
    """

    __slots__ = ("_known",)
    MOST = 8

    def __init__(self) -> None:
        self._known: tuple[tuple[Any, tuple[Any, ...], Any], ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return StockCalls, ()

    def serve(self, tensors: Sequence[Any], options: tuple[Any, ...]) -> bool:
        """Whether this call is known; as many tensors come with equal options."""
        if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
            return False
        if not self._known or dispatch._watching > 0:
            return False
        now = dispatch.moment()
        for then, known, check in self._known:
            if known == options and then == now and check(*tensors):
                return True
        return False

    def remember(self, tensors: Sequence[Tensor], options: tuple[Any, ...]) -> None:
        """Keeps a call whose choice is PyTorch, if it is plain eager code."""
        if not (tracing.is_eager() and tracing.is_plain(tensors)):
            return
        check = problem.guard(tensors)
        if check is not None:
            now = dispatch.moment()
            rest = [entry for entry in self._known if entry[0] == now]
            self._known = ((now, options, check), *rest[: self.MOST - 1])
