"""Whether PyTorch's own forward serves a call of our modules, known at the cost of a guard."""

from collections.abc import Sequence
from typing import Any

import torch

from mbm_kernels._core import dispatch, env, problem, tracing
from mbm_kernels._core.torch_private import tangents


class StockCalls:
    """What a module knows of its latest calls: whether PyTorch serves them.

    A call is like one of them while its tensors are alike (problem.py says what a guard compares,
    of modes, autocast and gradients too), its options are equal and nothing that the choice goes by
    has changed. Copies and pickles of a module know nothing.
    """

    __slots__ = ("_known",)
    MOST = 8

    def __init__(self) -> None:
        self._known: tuple[tuple[Any, tuple[Any, ...], Any, bool], ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return StockCalls, ()

    def find(self, tensors: Sequence[Any], options: tuple[Any, ...]) -> bool | None:
        """Whether PyTorch serves this call; None where no call like it is known.

        As many tensors come with equal options. Not for compilers, which would guard what is known.
        """
        if dispatch._watching > 0:
            return None
        now = dispatch._epoch, env._raw.get(env._BACKEND), torch.get_num_threads()  # moment()
        for then, known, check, served in self._known:
            if known == options and then == now and check(*tensors):
                return served if tangents._current_level < 0 else None
        return None

    def remember(self, tensors: Sequence[Any], options: tuple[Any, ...], served: bool) -> None:
        """Keeps a call, if it is plain eager code."""
        given = [x for x in tensors if x is not None]
        if len(given) < len(tensors) or not (tracing.is_eager() and tracing.is_plain(given)):
            return
        check = problem.guard(tensors)
        if check is not None:
            now = dispatch.moment()
            rest = [entry for entry in self._known if entry[0] == now]
            self._known = ((now, options, check, served), *rest[: self.MOST - 1])


class ServedByStock(torch.nn.Module):
    """A module of torch's that may answer a call itself: `super().forward` is PyTorch's own."""

    _stock_calls: StockCalls | None = None  # of the instance, once there are any

    def _remember(
        self, tensors: Sequence[Any], options: tuple[Any, ...], served: bool = True
    ) -> None:
        """Notes a call that PyTorch serves, or does not."""
        if torch.compiler.is_compiling():
            return
        if served:
            dispatch.note("torch")
        if self._stock_calls is None:
            vars(self)["_stock_calls"] = StockCalls()
        assert self._stock_calls is not None
        self._stock_calls.remember(tensors, options, served)
