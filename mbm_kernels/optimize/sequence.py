"""Chains that follow each other in a forward, run in one call of the native code.

Between two of them there is no Python then, and no tensor: what one leaves for another lies in
scratch memory, which is used again as soon as nothing reads it any more. The squeezes and scales of
squeeze-and-excitation (gating.py) may stand among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mbm_kernels._core import dispatch, native, packing, problem, profiling
from mbm_kernels._core.unchanged import Watch
from mbm_kernels.ops.conv_bias_act import geometry
from mbm_kernels.ops.conv_bias_act.backend_cpu import Constant
from mbm_kernels.optimize.chain import Chain
from mbm_kernels.optimize.gating import NativeMeans, NativeScale, Scale, Squeeze
from mbm_kernels.optimize.held import OfModules

_CPU = torch.device("cpu")
_LINE = 64  # bytes: maps start at a cache line
MOST_READY = 4  # kinds of inputs
MOST_SEEN = 64
FEW = 4  # channels of an image that the first kernel reads in any layout
# Nanoseconds that PyTorch takes to copy a float into another layout (1.1 to 1.3 on Ice Lake).
TURN_NS = 1.2

Native = Constant | NativeMeans | NativeScale


@dataclass(frozen=True, eq=False)
class Step:
    """One of a sequence; x and other are numbers of values: the inputs, then the results in order.

    other: a chain's residual, or what a scale multiplies x by.
    """

    what: Chain | Squeeze | Scale
    x: int
    other: int | None

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.x,) if self.other is None else (self.x, self.other)

    def native(self, values: Many[Tensor], y: Tensor) -> Native | None:
        """What the native code is told of it, y being its result; None where it does not run it."""
        return self.what.native(values[self.x], self._other(values), y)

    def ns(self, values: Many[Tensor]) -> float:
        """What it is predicted to take among others, which no layout changes for means and
        scales."""
        if not isinstance(self.what, Chain):
            return 0.0
        found = self.what.among(values[self.x], self._other(values))
        return math.nan if found is None else found.ns

    def one_by_one(self, values: Many[Tensor]) -> Tensor:
        """Its result."""
        return self.what(values[self.x], self._other(values))

    def watched(self, values: Many[Tensor]) -> Tensor:
        """Its result, by the backend that runs it among others."""
        x, other = values[self.x], self._other(values)
        if isinstance(self.what, Chain):
            found = self.what.among(x, other)
            return self.what(x, other, None if found is None else found.backend)
        return self.what(x, other)

    def _other(self, values: Many[Tensor]) -> Tensor | None:
        return None if self.other is None else values[self.other]


@dataclass(eq=False)
class Sequence:
    """Steps on `inputs` tensors; `outputs` are the numbers of the values that it returns.

    The native calls stand for the steps one by one where chains run "cpu" among others, for the
    kind of inputs that they were made for, and while a hash of every byte of what the weights come
    from is the same.
    """

    steps: tuple[Step, ...]
    inputs: int
    outputs: tuple[int, ...]
    _ready: tuple[_Ready, ...] = field(default=(), init=False, repr=False)
    # How all values lay in the first call of a kind; None where that was tried already.
    _seen: dict[Any, list[_Lies] | None] = field(default_factory=dict, init=False, repr=False)

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
        kind = (tuple([_Lies.of(t) for t in given]), dispatch.moment())
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
            self._seen[kind] = [_Lies.of(t) for t in values]
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


class _Lies(NamedTuple):
    """How a tensor lies in memory."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, t: Tensor) -> _Lies:
        return cls(t.shape, t.stride(), t.dtype, t.device)

    def like(self) -> Tensor:
        """A tensor that lies so, of any content: nothing reads it."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    """What runs for one kind of inputs: native calls, and steps alone where PyTorch is faster."""

    kind: Any
    check: Any
    moment: tuple[Any, ...]
    watch: Watch
    sources: list[Tensor]  # what the weights of native calls come from
    state: list[packing.State]  # theirs: one, replaced by an equal one
    runs: tuple[_Call | _Alone | _Turn, ...]
    blank: tuple[None, ...]
    outputs: tuple[int, ...]

    @classmethod
    def made(
        cls, sequence: Sequence, kind: Any, given: tuple[Tensor, ...], like: list[Tensor]
    ) -> _Ready | None:
        """For inputs like those given, and values like these; None where it cannot be made."""
        values, turns = _layout(sequence, like)
        natives = _natives(sequence, values)
        taken = [s.what for s, n in zip(sequence.steps, natives, strict=True) if n is not None]
        chains = [what for what in taken if isinstance(what, Chain)]
        sources = [t for chain in chains for t in chain.sources() if t is not None]
        check = problem.guard(given)
        plain = all(type(t) in (Tensor, torch.nn.Parameter) and t.is_cpu for t in sources)
        if check is None or not plain:
            return None
        # Before the weights are read, so that a write meanwhile is seen at the next call.
        watch, state = Watch(), packing.state_of(sources)
        for chain in chains:
            chain.watch_constants(watch)
        runs: tuple[_Call | _Alone | _Turn, ...] = _runs(sequence, values)
        before, after = turns
        runs = (*before, *runs, *after)
        return cls(
            kind=kind,
            check=check,
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
        if dispatch.moment() != self.moment or not self.watch.same():
            return False
        known = self.state[0]
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


@dataclass(frozen=True, slots=True, eq=False)
class _Alone:
    """A step that PyTorch runs, the number of its result, and how that has to lie."""

    step: Step
    y: int
    lies: _Lies

    def __call__(self, values: list[Any], _threads: int) -> None:
        step = self.step
        other = None if step.other is None else values[step.other]
        y = step.what(values[step.x], other)
        values[self.y] = y if y.stride() == self.lies.strides else self.lies.like().copy_(y)


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """Steps in one native call; inputs and outputs are numbers of values."""

    call: Any  # csrc's ConvSequence
    inputs: tuple[int, ...]
    outputs: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...]  # with shapes and strides
    scratch: int  # floats
    held: tuple[Any, ...]  # memory that the native code reads

    @classmethod
    def made(cls, first: int, steps: Many[Step], natives: Many[Native], kept: set[int]) -> _Call:
        """first: the number of the first step's result. kept: values that others read."""
        own = range(first, first + len(steps))
        read = dict.fromkeys(v for step in steps for v in step.reads)
        inputs = tuple(v for v in read if v not in own)
        outputs = tuple(v for v in own if v in kept)
        places, scratch = _places(first, steps, natives, inputs, outputs)
        call = native.cpu().ConvSequence(len(inputs) + len(outputs) + 1)
        for number, step, found in zip(own, steps, natives, strict=True):
            maps = (step.x, step.other, number)
            found.add_to(call, [(-1, 0) if v is None else places[v] for v in maps])
        of = [natives[v - first] for v in outputs]
        return cls(
            call,
            inputs,
            tuple((v, n.y_shape, n.y_strides) for v, n in zip(outputs, of, strict=True)),
            scratch,
            tuple(n.held for n in natives),
        )

    def __call__(self, values: list[Any], threads: int) -> None:
        for number, shape, strides in self.outputs:
            values[number] = torch.empty_strided(shape, strides, dtype=torch.float32, device=_CPU)
        scratch = native.empty((self.scratch,)) if self.scratch else None
        addresses = [values[v].data_ptr() for v in self.inputs]
        addresses += [values[v].data_ptr() for v, _, _ in self.outputs]
        addresses.append(0 if scratch is None else scratch.data_ptr())
        self.call.run(addresses, threads)


@dataclass(frozen=True, slots=True, eq=False)
class _Turn:
    """Copies values into another layout."""

    values: tuple[int, ...]
    layout: torch.memory_format

    def __call__(self, values: list[Any], _threads: int) -> None:
        for v in self.values:
            values[v] = values[v].contiguous(memory_format=self.layout)


def _layout(
    sequence: Sequence, like: list[Tensor]
) -> tuple[list[Tensor], tuple[Many[_Turn], Many[_Turn]]]:
    """Values as they lie within the sequence: like these, or channels_last where that is predicted
    to take less, with what turns inputs and outputs."""
    maps = [t.dim() == 4 and not geometry.is_channels_last(t) and t.stride(1) != 1 for t in like]
    first = sequence.inputs
    # Images of few channels are read as they are.
    maps[:first] = [m and t.shape[1] > FEW for m, t in zip(maps, like[:first], strict=False)]
    if not any(maps):
        return like, ((), ())
    last = [
        torch.empty_like(t, memory_format=torch.channels_last) if turned else t
        for t, turned in zip(like, maps, strict=True)
    ]
    times = [[step.ns(values) for step in sequence.steps] for values in (like, last)]
    ends = (*range(first), *sequence.outputs)
    turned = tuple(v for v in ends if maps[v])
    extra = TURN_NS * sum(like[v].numel() for v in turned)
    if not sum(times[1]) + extra < sum(times[0]):  # NaN: nothing is known
        return like, ((), ())
    before, after = ([v for v in turned if (v < first) is early] for early in (True, False))
    return last, (_turns(before, torch.channels_last), _turns(after, torch.contiguous_format))


def _turns(values: list[int], layout: torch.memory_format) -> tuple[_Turn, ...]:
    return (_Turn(tuple(values), layout),) if values else ()


def _natives(sequence: Sequence, values: list[Tensor]) -> list[Native | None]:
    """What the native code is told of each step."""
    first = sequence.inputs
    return [s.native(values, values[first + i]) for i, s in enumerate(sequence.steps)]


def _runs(sequence: Sequence, values: list[Tensor]) -> tuple[_Call | _Alone, ...]:
    """Native calls of as many steps as follow each other, each of a chain at least."""
    first = sequence.inputs
    steps, natives = sequence.steps, _natives(sequence, values)
    found: list[_Call | _Alone] = []
    begin = 0
    while begin < len(steps):
        end = begin
        while end < len(steps) and natives[end] is not None:
            end += 1
        if any(isinstance(step.what, Chain) for step in steps[begin:end]):
            outside = {v for step in (*steps[:begin], *steps[end:]) for v in step.reads}
            kept = outside | {*sequence.outputs}
            ready = [n for n in natives[begin:end] if n is not None]
            found.append(_Call.made(first + begin, steps[begin:end], ready, kept))
        else:
            end = max(end, begin + 1)
            found += [
                _Alone(steps[i], first + i, _Lies.of(values[first + i])) for i in range(begin, end)
            ]
        begin = end
    return tuple(found)


def _places(
    first: int,
    steps: Many[Step],
    natives: Many[Native],
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
) -> tuple[dict[int, tuple[int, int]], int]:
    """Where each value lies, as csrc's ConvPlace, and the floats of scratch memory.

    The addresses of a call are those of the inputs, of the outputs, and of the scratch memory.
    """
    last_use = {v: i for i, step in enumerate(steps) for v in step.reads}
    places = {v: (i, 0) for i, v in enumerate((*inputs, *outputs))}
    scratch = len(places)
    in_use: dict[int, tuple[int, int]] = {}  # of values in scratch: start and end in bytes
    size = 0
    for i, found in enumerate(natives):
        value = first + i
        in_use = {v: span for v, span in in_use.items() if last_use.get(v, -1) >= i}
        if value in places:
            continue
        needed = -(-4 * math.prod(found.y_shape) // _LINE) * _LINE
        start = _start(steps[i], found, i, in_use, last_use)
        if start is None:
            start = _gap(sorted(in_use.values()), needed)
        in_use[value] = (start, start + needed)
        places[value] = (scratch, start)
        size = max(size, start + needed)
    return places, size // 4


def _start(
    step: Step,
    found: Native,
    i: int,
    in_use: dict[int, tuple[int, int]],
    last_use: dict[int, int],
) -> int | None:
    """Where a scale's map lies, which nothing reads after it: its result takes its place."""
    if not isinstance(found, NativeScale) or step.other is None:
        return None
    x = step.other if found.swapped else step.x
    return in_use[x][0] if x in in_use and last_use[x] == i else None


def _gap(taken: list[tuple[int, int]], needed: int) -> int:
    """The first place for `needed` bytes beside those taken."""
    start = 0
    for begin, end in taken:
        if begin - start >= needed:
            break
        start = max(start, end)
    return start
