"""What may be replaced, modules and chains of them alike: as ours, as stock, and in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from mbm_kernels.nn import counterparts
from mbm_kernels.nn.trial import Call
from mbm_kernels.optimize import errors, outputs
from mbm_kernels.optimize.chain import Chain
from mbm_kernels.optimize.sequence import Sequence

Forward = Callable[..., Any]


@dataclass(eq=False)
class Copies:
    """Forwards on copies without dropout, and the parameters of the copies in both dtypes."""

    ours: Forward
    stock: Forward
    truth: Forward  # PyTorch's in float64
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    double_parameters: dict[str, nn.Parameter] = field(default_factory=dict)


@dataclass(eq=False)
class Candidate:
    """One module or chain; `calls` are those of the sample, of each kind one, with their number."""

    name: str
    was: str
    now: str
    op: str
    calls: list[tuple[Call, int]] = field(default_factory=list, kw_only=True)

    def use(self, backend: str) -> None:
        """Sets the backend that ours runs."""
        raise NotImplementedError

    def forms(self) -> tuple[Forward, Forward]:
        """The forwards of ours and of PyTorch, on the parameters themselves."""
        raise NotImplementedError

    def copies(self) -> Copies:
        """Both forms apart from the model."""
        raise NotImplementedError

    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that training differentiates by."""
        raise NotImplementedError

    def parity(self, backward: bool) -> errors.Parity:
        """The errors in the first of the calls."""
        call = self.calls[0][0]
        made, winograd = self.copies(), self.op == "conv_bias_act"

        def values(form: Forward, by_torch: bool) -> errors.Values:
            args, kwargs = outputs.detached((call.args, call.kwargs))
            return errors.values(form, args, kwargs, made.parameters, backward, by_torch)

        args, kwargs = outputs.in_float64((call.args, call.kwargs))
        truth = errors.values(made.truth, args, kwargs, made.double_parameters, backward, True)
        return errors.compare(values(made.ours, False), values(made.stock, True), truth, winograd)


@dataclass(eq=False)
class ModuleCandidate(Candidate):
    """A module that is swapped already."""

    module: nn.Module
    backend: str = field(default="auto", init=False)

    def use(self, backend: str) -> None:
        self.backend = self.module.backend = backend  # type: ignore[assignment]

    def forms(self) -> tuple[Forward, Forward]:
        known = counterparts.of(self.module)
        assert known is not None
        return _bound(known.ours, self.module), _bound(known.stock, self.module)

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    def copies(self) -> Copies:
        known = counterparts.of(self.module)
        assert known is not None
        own, precise = _clone(self.module), _clone(self.module).double()
        return Copies(
            _bound(known.ours, own),
            _bound(known.stock, own),
            _bound(known.stock, precise),
            dict(own.named_parameters()),
            dict(precise.named_parameters()),
        )

    def why_not_undone(self) -> str | None:
        known = counterparts.of(self.module)
        if known is not None and type(self.module) is known.ours:
            return None
        return f"its class is {type(self.module).__qualname__} now"

    def undo(self) -> None:
        counterparts.restore(self.module)

    def redo(self) -> None:
        counterparts.swap(self.module, self.backend)


@dataclass(eq=False)
class ChainCandidate(Candidate):
    """A chain in a container that runs it already."""

    chain: Chain
    container: nn.Module
    attribute: str

    def use(self, backend: str) -> None:
        self.chain.backend = backend

    def forms(self) -> tuple[Forward, Forward]:
        return Sequence.of(self.chain), self.chain.stock

    def parameters(self) -> dict[str, nn.Parameter]:
        return {}

    def copies(self) -> Copies:
        conv: Any = _clone(self.chain.conv).double()
        norm: Any = None if self.chain.norm is None else _clone(self.chain.norm).double()
        truth = replace(self.chain, conv=conv, norm=norm)
        return Copies(self.chain, self.chain.stock, truth.stock)


def _bound(kind: type[nn.Module], module: nn.Module) -> Forward:
    forward = kind.forward
    return lambda *args, **kwargs: forward(module, *args, **kwargs)


def _clone(module: nn.Module) -> nn.Module:
    """A copy of a module's parameters and state, not of its hooks, which may hold a whole model."""
    made = module.__new__(type(module))
    vars(made).update(vars(module))
    for name in ("_parameters", "_buffers", "_modules"):
        vars(made)[name] = copy.deepcopy(vars(module)[name])
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        vars(made)[name] = type(vars(module)[name])()
    made._apply(lambda tensor: tensor)  # a GRU's list of weights follows its parameters
    return errors.without_dropout(made)


def kinds_of_calls(calls: list[Call]) -> list[tuple[Call, int]]:
    """The first call of each kind, by shapes, strides and dtypes, and how many there are."""
    found: dict[Any, tuple[Call, int]] = {}
    for call in calls:
        key = repr(outputs.mapped((call.args, call.kwargs), _kind))
        first, count = found.get(key, (call, 0))
        found[key] = (first, count + 1)
    return list(found.values())


def _kind(tensor: torch.Tensor) -> Any:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype
