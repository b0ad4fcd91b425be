"""Containers whose forward runs chains: the same instance, of a subclass of its own class.

The forward that the class had is called instead wherever the rewritten one might not mean the same:
in training, where gradients are recorded, with other arguments than those traced, under a compiler
or tracer, where a hook sits on a module of a chain or a module was replaced. The first call runs
both and compares.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mbm_kernels._core import native, torch_private, tracing
from mbm_kernels._core.unchanged import Watch
from mbm_kernels.nn import counterparts, trial
from mbm_kernels.optimize import outputs
from mbm_kernels.optimize.chain import Chain
from mbm_kernels.optimize.held import OfModules
from mbm_kernels.optimize.sequence import Sequence

PLAN = "_mbm_plan"
# Of a first call, over the largest value: what no rounding explains.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True, eq=False)
class Inlined:
    """A container whose forward is part of another's: what must stay for that to be right."""

    module: nn.Module
    kind: type[nn.Module]  # of a fused one that which it had before
    modules: tuple[nn.Module | None, ...]
    plan: Plan | None  # of a fused one

    @classmethod
    def of(cls, module: nn.Module) -> Inlined:
        kind = module._mbm_own_class if isinstance(module, Fused) else type(module)
        return cls(module, kind, tuple(module._modules.values()), vars(module).get(PLAN))

    def why_not(self) -> str | None:
        module = self.module
        kind = type(module)
        if vars(module).get(PLAN) is not self.plan:
            return f"a {self.kind.__name__} in it was fused or unfused"
        if (kind if self.plan is None else getattr(kind, "_mbm_own_class", None)) is not self.kind:
            return f"the class of a {self.kind.__name__} in it was changed"
        watched = kind is nn.Sequential and trial.is_watched(module)
        if "forward" in vars(module) and not watched:
            return f"the forward of a {self.kind.__name__} in it was replaced"
        if counterparts.has_hooks(module):
            return f"a hook sits on a {self.kind.__name__} in it"
        if tuple(module._modules.values()) != self.modules:
            return f"a {self.kind.__name__} in it has other modules"
        if module.training:
            return f"a {self.kind.__name__} in it is in training mode"
        return None

    def watch(self, watch: Watch) -> None:
        """Adds what `why_not` looks at."""
        module = self.module
        watch.module(module, "training", "_modules", PLAN)
        watch.items(module._modules, module._modules)
        watch.size(module._modules)


@dataclass(eq=False)
class Plan:
    """A rewritten forward.

    arguments: names of the tensors it takes. source: its text. attributes: what the text finds on
    the module, beside what is there: chains, sequences of them, and modules that lie deep in it.
    inlined: the containers whose modules it calls itself. fallback: a plan that may serve where
    this one may not. checked: the first call has compared it with the forward as written.
    """

    arguments: tuple[str, ...]
    source: str
    names: dict[str, Any]  # of the source's globals
    attributes: dict[str, Any]
    inlined: tuple[Inlined, ...]
    fallback: Plan | None = None
    checked: bool = False
    refused: str | None = None
    parts: tuple[OfModules, ...] = field(init=False)  # what stands for modules
    _run: Callable[..., Any] | None = field(default=None, init=False, repr=False)
    # Sees any change of what `why_not` found right.
    _watch: Watch | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        found: list[OfModules] = []
        for value in self.attributes.values():
            if isinstance(value, Chain):
                found.append(value)
            elif isinstance(value, Sequence):
                found += value.parts
        self.parts = tuple(found)

    @property
    def chains(self) -> tuple[Chain, ...]:
        return tuple(part for part in self.parts if isinstance(part, Chain))

    def bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """The arguments in order; None where they are not those that were traced."""
        if kwargs:
            named = dict(zip(self.arguments, args, strict=False))
            if len(args) > len(self.arguments) or named.keys() & kwargs.keys():
                return None
            named |= kwargs
            if named.keys() != set(self.arguments):
                return None
            args = tuple(named[name] for name in self.arguments)
        elif len(args) != len(self.arguments):
            return None
        return args if all(type(a) in (Tensor, nn.Parameter) for a in args) else None

    def why_not(self, module: nn.Module, args: tuple[Any, ...]) -> str | None:
        """Why the rewritten forward cannot stand for the module's own at this moment."""
        if self.refused is not None:
            return self.refused
        if module.training:
            return "it is in training mode"
        if not tracing.is_eager():
            return "a compiler, a tracer, autocast or a mode is at work"
        if torch.is_grad_enabled() and _has_gradients(module, args):
            return "gradients are recorded; call the model under torch.no_grad()"
        if torch_private.any_global_hook():
            return "a hook sits on all modules"
        if self._watch is not None and self._watch.same():
            return None
        parts: tuple[Inlined | OfModules, ...] = (*self.inlined, *self.parts)
        for part in parts:
            reason = part.why_not()
            if reason is not None:
                return reason
        self._watch = None
        if native.cpu_reason() is None:
            self._watch = Watch()
            for part in parts:
                part.watch(self._watch)
        return None

    def run(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """The rewritten forward."""
        if self._run is None:
            scope = dict(self.names)
            exec(compile(self.source, "<mbm_kernels.optimize>", "exec"), scope)
            self._run = scope["forward"]
        return self._run(module, *args)

    def __getstate__(self) -> dict[str, Any]:
        state = {**vars(self), "_run": None, "_watch": None}
        modules = {k: v.__name__ for k, v in self.names.items() if isinstance(v, ModuleType)}
        state["names"] = {k: v for k, v in self.names.items() if k not in modules}
        return {**state, "_modules": modules}

    def __setstate__(self, state: dict[str, Any]) -> None:
        modules = state.pop("_modules")
        vars(self).update(state)
        self.names |= {name: __import__(path, fromlist=["_"]) for name, path in modules.items()}


class Fused(counterparts.RunsChains):
    """What a container's class is mixed with.

    _mbm_own_class: the class that the container had before.
    """

    _mbm_own_class: type[nn.Module]

    def in_chains(self) -> set[nn.Module]:
        plan: Plan = vars(self)[PLAN]
        return {module for chain in plan.chains for module in chain.modules}

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = super().__reduce_ex__(protocol)[2]
        return _remade, (type(self)._mbm_own_class,), state

    def unfuse(self) -> None:
        """Makes the module what it was."""
        _put(self, None)
        module: nn.Module = self
        module.__class__ = type(self)._mbm_own_class


def fuse(module: nn.Module, plan: Plan) -> None:
    """Gives a module the rewritten forward; one that has another already, this one."""
    _put(module, plan)
    if not isinstance(module, Fused):
        module.__class__ = _fused_class(type(module))


@dataclass(eq=False)
class FusedForward:
    """A module's rewritten forward, as a change that can be undone.

    Where it took the place of another, that is the plan's fallback, and comes back.
    """

    name: str
    module: nn.Module
    plan: Plan | None = field(default=None, kw_only=True)
    made: type[nn.Module] | None = field(default=None, init=False)

    def why_not_undone(self) -> str | None:
        if type(self.module) is self.made:
            return None
        return f"its class is another {type(self.module).__qualname__} now"

    def undo(self) -> None:
        assert self.plan is not None
        assert isinstance(self.module, Fused)
        if self.plan.fallback is None:
            self.module.unfuse()
        else:
            fuse(self.module, self.plan.fallback)

    def redo(self) -> None:
        assert self.plan is not None
        fuse(self.module, self.plan)
        self.made = type(self.module)


def _put(module: nn.Module, plan: Plan | None) -> None:
    """Makes `plan`, and what it finds on the module, take the place of the plan before."""
    attributes = vars(module)
    before: Plan | None = attributes.pop(PLAN, None)
    while before is not None:
        for name in before.attributes:
            attributes.pop(name, None)
        before = before.fallback
    if plan is not None:
        attributes[PLAN] = plan
    while plan is not None:
        attributes.update(plan.attributes)
        plan = plan.fallback


def _has_gradients(module: nn.Module, args: tuple[Any, ...]) -> bool:
    """Whether anything in the module's forward may be differentiated; a traced forward has lost
    where its author switched that off."""
    return any(a.requires_grad for a in args) or any(p.requires_grad for p in module.parameters())


def _forward(
    module: nn.Module, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The rewritten forward of a module where it may run, else its `own`."""
    plan: Plan | None = vars(module).get(PLAN)
    given = None if plan is None else plan.bound(args, kwargs)
    if given is not None:
        while plan is not None:
            if plan.why_not(module, given) is None:
                run = plan.run if plan.checked else functools.partial(_first, plan, own)
                return run(module, given)
            plan = plan.fallback
    return own(module, *args, **kwargs)


def _first(plan: Plan, own: Callable[..., Any], module: nn.Module, args: tuple[Any, ...]) -> Any:
    """Both forwards, the class's own being right."""
    with torch.random.fork_rng(devices=[]):
        try:
            found: Any = plan.run(module, outputs.detached(args))
        except Exception as error:  # whatever a wrong trace leads to
            found = error
    expected = own(module, *args)
    if isinstance(found, Exception) or not _alike(found, expected):
        plan.refused = "its forward, as traced, gives other results than as written"
        warnings.warn(f"optimize: {type(module).__name__}: {plan.refused}", stacklevel=3)
    plan.checked = True
    return expected


def _fused_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of Fused and of `kind`, made for each module anew: pickles name `kind` alone."""
    own: Callable[..., Any] = kind.forward

    @functools.wraps(own)  # tracers read its arguments
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _forward(self, own, args, kwargs)

    names = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "forward": forward,
        "_mbm_own_class": kind,
    }
    return type(kind.__name__, (Fused, kind), names)


def _remade(kind: type[nn.Module]) -> nn.Module:
    made = _fused_class(kind)
    return made.__new__(made)


@torch.no_grad()
def _alike(found: Any, expected: Any) -> bool:
    """Whether two results have the same form and, but for rounding, the same values."""
    if type(found) is not type(expected):
        return False
    ours, theirs = dict(outputs.tensors(found)), dict(outputs.tensors(expected))
    if ours.keys() != theirs.keys():
        return False
    for path, expected_tensor in theirs.items():
        tensor = ours[path]
        if tensor.shape != expected_tensor.shape or tensor.dtype != expected_tensor.dtype:
            return False
        largest = float(expected_tensor.abs().max()) if tensor.numel() else 0.0
        limit = TOLERANCE.get(tensor.dtype, 1e-1) * max(largest, 1e-30)
        difference = (tensor - expected_tensor).abs()
        if math.isfinite(largest) and not bool((difference <= limit).all()):
            return False
    return True
