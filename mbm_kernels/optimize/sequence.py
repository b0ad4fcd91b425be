"""Chains that follow each other in a forward, run in one call of the native code (runs.py).

The squeezes and scales of squeeze-and-excitation (gating.py) may stand among them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import dispatch, native, packing, problem, profiling
from mbm_kernels._core.unchanged import Watch
from mbm_kernels.optimize.chain import Chain
from mbm_kernels.optimize.heads import Head
from mbm_kernels.optimize.held import OfModules
from mbm_kernels.optimize.runs import (
    Lies,
    Program,
    Run,
    Step,
    layout_of,
    live_of,
    natives_of,
    runs_of,
)

MOST_READY = 4  # kinds of inputs
MOST_SEEN = 64


@dataclass(eq=False)
class Sequence(Program):
    """A program that runs natively where it can.

    The native calls stand for the steps one by one where chains run "cpu" among others, for the
    kind of inputs that they were made for, and while a hash of every byte of what the weights come
    from is the same.
    """

    _ready: tuple[_Ready, ...] = field(default=(), init=False, repr=False)
    # How all values lay in the first call of a kind; None where that was tried already.
    _seen: dict[Any, list[Lies] | None] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, chain: Chain) -> Sequence:
        """A chain by itself."""
        residual = 1 if chain.residual else None
        return cls((Step(chain, 0, residual),), 2 if chain.residual else 1, (1 + chain.residual,))

    @property
    def chains(self) -> tuple[Chain, ...]:
        return tuple(step.what for step in self.steps if isinstance(step.what, Chain))

    @property
    def parts(self) -> tuple[OfModules, ...]:
        """What stands for modules."""
        return tuple(step.what for step in self.steps)

    def __call__(self, *given: Tensor) -> Any:
        if dispatch.is_watched() or profiling.active():
            return self._one_by_one(given, Step.watched)[1]
        for ready in self._ready:
            if ready.check(*given):
                if ready.holds():
                    return ready.run(given)
                self._drop(ready)
                break
        return self._not_ready(given)

    def _one_by_one(
        self, given: tuple[Tensor, ...], run: Callable[[Step, list[Tensor]], Tensor]
    ) -> tuple[list[Tensor], Any]:
        values = list(given)
        for step in self.steps:
            values.append(run(step, values))
        return values, _results(values, self.outputs)

    def _not_ready(self, given: tuple[Tensor, ...]) -> Any:
        """Runs the steps one by one; when a kind of inputs comes again, makes native calls."""
        kind = (tuple([Lies.of(t) for t in given]), dispatch.moment())
        seen = self._seen.get(kind)
        if seen is not None:
            self._seen[kind] = None
            made = _Ready.made(self, kind, given, [lies.like() for lies in seen])
            if made is not None:
                for old in self._ready[MOST_READY - 1 :]:
                    self._drop(old)
                self._ready = (made, *self._ready)
                return made.run(given)
        values, results = self._one_by_one(given, Step.one_by_one)
        if kind not in self._seen:
            if len(self._seen) >= MOST_SEEN:
                self._seen.clear()
            self._seen[kind] = [Lies.of(t) for t in values]
        return results

    def _drop(self, ready: _Ready) -> None:
        self._ready = tuple(r for r in self._ready if r is not ready)
        self._seen.pop(ready.kind, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_ready": (), "_seen": {}}


def _results(values: Many[Tensor], outputs: tuple[int, ...]) -> Any:
    if len(outputs) == 1:
        return values[outputs[0]]
    return tuple([values[i] for i in outputs])


@dataclass(frozen=True, slots=True, eq=False)
class _Live:
    """Weights that native calls read where they lie, and how many bytes their storages have to
    have."""

    weights: tuple[Tensor, ...]
    check: Any
    least: tuple[int, ...]

    @classmethod
    def of(cls, weights: list[Tensor]) -> _Live | None:
        """None where this torch cannot tell whether their shapes are as they were."""
        check = problem.guard(weights) if weights else None
        if weights and check is None:
            return None
        least = [int(t.storage_offset()) * t.element_size() + native.extent(t) for t in weights]
        return cls(tuple(weights), check, tuple(least))

    def ready(self) -> bool:
        """Whether they can be read as they could be."""
        if not self.weights:
            return True
        sizes = [t.untyped_storage().nbytes() for t in self.weights]
        return self.check(*self.weights) and all(map(operator.ge, sizes, self.least))


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    """What runs for one kind of inputs: native calls, and steps alone where PyTorch is faster."""

    kind: Any
    check: Any
    live: _Live
    moment: tuple[Any, ...]
    watch: Watch
    sources: list[Tensor]  # what the weights of native calls come from
    state: list[packing.State]  # theirs: one, replaced by an equal one
    runs: tuple[Run, ...]
    blank: tuple[None, ...]
    outputs: tuple[int, ...]

    @classmethod
    def made(
        cls, sequence: Sequence, kind: Any, given: tuple[Tensor, ...], like: list[Tensor]
    ) -> _Ready | None:
        """For inputs like those given, and values like these; None where it cannot be made."""
        values, turns = layout_of(sequence, like)
        natives = natives_of(sequence, values)
        taken = [s.what for s, n in zip(sequence.steps, natives, strict=True) if n is not None]
        chains = [what for what in taken if isinstance(what, Chain)]
        live = _Live.of([t for found in natives for t in live_of(found)])
        sources = [t for chain in chains for t in chain.sources() if t is not None]
        check = problem.guard(given)
        plain = all(type(t) in (Tensor, torch.nn.Parameter) and t.is_cpu for t in sources)
        if check is None or live is None or not plain:
            return None
        # Before the weights are read, so that a write meanwhile is seen at the next call.
        watch, state = Watch(), packing.state_of(sources)
        for what in taken:
            if isinstance(what, Chain | Head):
                what.watch_constants(watch)
        before, after = turns
        runs = (*before, *runs_of(sequence, values), *after)
        return cls(
            kind=kind,
            check=check,
            live=live,
            moment=dispatch.moment(),
            watch=watch,
            sources=sources,
            state=[state],
            runs=runs,
            blank=(None,) * len(sequence.steps),
            outputs=sequence.outputs,
        )

    def holds(self) -> bool:
        """Whether what it was made of is as it was, but for the inputs."""
        if dispatch.moment() != self.moment or not self.watch.same() or not self.live.ready():
            return False
        known = self.state[0]
        if packing.stands_still(self.sources, known):
            return True
        state = packing.state_of(self.sources, known)
        if not state.same(known):
            return False
        self.state[0] = state
        return True

    def run(self, given: tuple[Tensor, ...]) -> Any:
        values: list[Any] = [*given, *self.blank]
        threads = self.moment[2]
        for run in self.runs:
            run(values, threads)
        return _results(values, self.outputs)
