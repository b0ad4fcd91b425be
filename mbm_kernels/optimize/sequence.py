"""Chains that follow each other in a forward, run in one call of the native code.

Between two of them there is no Python then, and no tensor: what one leaves for another lies in
scratch memory, which is used again as soon as nothing reads it any more.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import dispatch, native, packing, problem, profiling
from mbm_kernels._core.unchanged import Watch
from mbm_kernels.ops.conv_bias_act.backend_cpu import Constant
from mbm_kernels.optimize.chain import Chain

_CPU = torch.device("cpu")
_LINE = 64  # bytes: maps start at a cache line
MOST_READY = 4  # kinds of inputs
MOST_SEEN = 64


@dataclass(frozen=True, eq=False)
class Step:
    """One chain; x and residual are numbers of values: the inputs, then the results in order."""

    chain: Chain
    x: int
    residual: int | None


@dataclass(eq=False)
class Sequence:
    """Steps on `inputs` tensors; `outputs` are the numbers of the values that it returns.

    The native call stands for the chains one by one where each would run "cpu", for the kind of
    inputs that it was made for, and while a hash of every byte of what the weights come from is
    the same.
    """

    steps: tuple[Step, ...]
    inputs: int
    outputs: tuple[int, ...]
    _ready: tuple[_Ready, ...] = field(default=(), init=False, repr=False)
    # Kinds of calls that none was ready for, and whether that was tried.
    _seen: dict[Any, bool] = field(default_factory=dict, init=False, repr=False)

    @property
    def chains(self) -> tuple[Chain, ...]:
        return tuple(step.chain for step in self.steps)

    def __call__(self, *given: Tensor) -> Any:
        if _alone():
            for ready in self._ready:
                if ready.check(*given):
                    if ready.holds():
                        return ready.run(given)
                    self._drop(ready)
                    break
        return self._one_by_one(given)

    def _one_by_one(self, given: tuple[Tensor, ...]) -> Any:
        values = list(given)
        for step in self.steps:
            residual = None if step.residual is None else values[step.residual]
            values.append(step.chain(values[step.x], residual))
        self._look_at(values)
        found = tuple([values[i] for i in self.outputs])
        return found[0] if len(found) == 1 else found

    def _look_at(self, values: list[Tensor]) -> None:
        """Makes the native call ready when a kind of inputs comes for the second time."""
        if not _alone():
            return
        kind = (_kinds(values[: self.inputs]), dispatch.moment())
        tried = self._seen.get(kind)
        if len(self._seen) >= MOST_SEEN:
            self._seen.clear()
        self._seen[kind] = tried is not None
        if tried is not False:
            return
        made = _Ready.made(self, kind, values)
        if made is not None:
            for old in self._ready[MOST_READY - 1 :]:
                self._drop(old)
            self._ready = (made, *self._ready)

    def _drop(self, ready: _Ready) -> None:
        self._ready = tuple(r for r in self._ready if r is not ready)
        self._seen.pop(ready.kind, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_ready": (), "_seen": {}}


def _alone() -> bool:
    """Whether nobody asks which backend each chain takes, or how long it runs."""
    return not (dispatch.is_watched() or profiling.active())


def _kinds(tensors: Many[Tensor]) -> tuple[Any, ...]:
    return tuple([(t.shape, t.stride(), t.dtype) for t in tensors])


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    """A native call for one kind of inputs."""

    kind: Any
    check: Any
    moment: tuple[Any, ...]
    watch: Watch
    sources: list[Tensor]  # what the weights come from
    state: list[packing.State]  # theirs: one, replaced by an equal one
    call: Any  # csrc's ConvSequence
    outputs: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # shapes and strides
    scratch: int  # floats
    held: tuple[Any, ...]  # memory that the native code reads

    @classmethod
    def made(cls, sequence: Sequence, kind: Any, values: list[Tensor]) -> _Ready | None:
        """For inputs and results like these; None where it cannot stand for the chains."""
        chains = sequence.chains
        sources = [t for chain in chains for t in chain.sources() if t is not None]
        if not all(type(t) in (Tensor, torch.nn.Parameter) and t.is_cpu for t in sources):
            return None
        # First of all, so that a write meanwhile is seen at the next call.
        watch, state = Watch(), packing.state_of(sources)
        for chain in chains:
            chain.watch_constants(watch)
        check = problem.guard(values[: sequence.inputs])
        constants = _constants(sequence, values)
        if check is None or constants is None:
            return None
        places, scratch = _places(sequence, constants)
        call = native.cpu().ConvSequence(sequence.inputs + len(sequence.outputs) + 1)
        for i, (step, found) in enumerate(zip(sequence.steps, constants, strict=True)):
            at = (step.x, step.residual, sequence.inputs + i)
            call.add(found.block, found.weight, [(-1, 0) if v is None else places[v] for v in at])
        results = [constants[i - sequence.inputs] for i in sequence.outputs]
        return cls(
            kind=kind,
            check=check,
            moment=dispatch.moment(),
            watch=watch,
            sources=sources,
            state=[state],
            call=call,
            outputs=tuple((c.y_shape, c.y_strides) for c in results),
            scratch=scratch,
            held=tuple(c.held for c in constants),
        )

    def holds(self) -> bool:
        """Whether what it was made of is as it was, but for the inputs."""
        if dispatch.moment() != self.moment or not self.watch.same():
            return False
        known = self.state[0]
        state = packing.state_of(self.sources, known)
        if not state.same(known):
            return False
        self.state[0] = state
        return True

    def run(self, given: tuple[Tensor, ...]) -> Any:
        found = [
            torch.empty_strided(shape, strides, dtype=torch.float32, device=_CPU)
            for shape, strides in self.outputs
        ]
        scratch = native.empty((self.scratch,)) if self.scratch else None
        tensors = (*given, *found)
        addresses = [t.data_ptr() for t in tensors]
        addresses.append(0 if scratch is None else scratch.data_ptr())
        self.call.run(addresses, self.moment[2])
        return found[0] if len(found) == 1 else tuple(found)


def _constants(sequence: Sequence, values: list[Tensor]) -> list[Constant] | None:
    """Of each step; None where one does not run "cpu" or reads what it must copy first."""
    found = []
    for i, step in enumerate(sequence.steps):
        residual = None if step.residual is None else values[step.residual]
        try:
            constant = step.chain.constant(values[step.x], residual)
        except (TypeError, ValueError):  # PyTorch ran it, or a residual broadcasts
            return None
        result = values[sequence.inputs + i]
        if constant is None or result.stride() != constant.y_strides:
            return None
        found.append(constant)
    return found


def _places(sequence: Sequence, constants: list[Constant]) -> tuple[list[tuple[int, int]], int]:
    """Where each value lies, as csrc's ConvPlace, and the floats of scratch memory.

    The addresses of a call are those of the inputs, of the outputs, and of the scratch memory.
    """
    first = sequence.inputs
    last_use = {}
    for i, step in enumerate(sequence.steps):
        last_use.update({v: i for v in (step.x, step.residual) if v is not None})
    places = [(i, 0) for i in range(first)]
    in_use: dict[int, tuple[int, int]] = {}  # of values in scratch: start and end in bytes
    size = 0
    for i, constant in enumerate(constants):
        value = first + i
        in_use = {v: span for v, span in in_use.items() if last_use.get(v, -1) >= i}
        if value in sequence.outputs:
            places.append((first + sequence.outputs.index(value), 0))
            continue
        batch, channels, height, width = constant.y_shape
        needed = -(-4 * batch * channels * height * width // _LINE) * _LINE
        start = _gap(sorted(in_use.values()), needed)
        in_use[value] = (start, start + needed)
        places.append((first + len(sequence.outputs), start))
        size = max(size, start + needed)
    return places, size // 4


def _gap(taken: list[tuple[int, int]], needed: int) -> int:
    """The first place for `needed` bytes beside those taken."""
    start = 0
    for begin, end in taken:
        if begin - start >= needed:
            break
        start = max(start, end)
    return start
