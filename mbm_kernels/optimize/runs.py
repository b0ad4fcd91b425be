"""What a sequence runs for one kind of inputs: native calls of many steps, and steps alone.

Between two steps of a native call there is no Python, and no tensor: what one leaves for another
lies in scratch memory, which is used again as soon as nothing reads it any more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mbm_kernels._core import native
from mbm_kernels.ops.conv_bias_act import geometry
from mbm_kernels.ops.conv_bias_act.backend_cpu import Constant
from mbm_kernels.ops.conv_bias_act.dispatch import FEW_CHANNELS
from mbm_kernels.optimize.chain import TURN_NS, Chain
from mbm_kernels.optimize.gating import NativeMeans, NativeScale, Scale, Squeeze
from mbm_kernels.optimize.heads import Head, NativeHead

_CPU = torch.device("cpu")
_LINE = 64  # bytes: maps start at a cache line

What = Chain | Squeeze | Scale | Head
Native = Constant | NativeMeans | NativeScale | NativeHead


@dataclass(frozen=True, eq=False)
class Step:
    """One of a sequence; x and other are numbers of values: the inputs, then the results in order.

    other: a chain's residual, or what a scale multiplies x by.
    """

    what: What
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
        if isinstance(self.what, Head):
            return self.what.ns(values[self.x])
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
class Program:
    """Steps on `inputs` tensors; `outputs` are the numbers of the values that it returns."""

    steps: tuple[Step, ...]
    inputs: int
    outputs: tuple[int, ...]


class Lies(NamedTuple):
    """How a tensor lies in memory."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, t: Tensor) -> Lies:
        return cls(t.shape, t.stride(), t.dtype, t.device)

    def like(self) -> Tensor:
        """A tensor that lies so, of any content: nothing reads it."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)


@dataclass(frozen=True, slots=True, eq=False)
class Alone:
    """A step that PyTorch runs, the number of its result, and how that has to lie."""

    step: Step
    y: int
    lies: Lies

    def __call__(self, values: list[Any], _threads: int) -> None:
        y = self.step.one_by_one(values)
        values[self.y] = y if y.stride() == self.lies.strides else self.lies.like().copy_(y)


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """Steps in one native call; inputs and outputs are numbers of values."""

    call: Any  # csrc's ConvSequence
    inputs: tuple[int, ...]
    outputs: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...]  # with shapes and strides
    scratch: int  # floats
    live: tuple[Tensor, ...]  # weights that the native code reads where they lie
    held: tuple[Any, ...]  # memory that the native code reads

    @classmethod
    def made(cls, first: int, steps: Many[Step], natives: Many[Native], kept: set[int]) -> Call:
        """first: the number of the first step's result. kept: values that others read."""
        own = range(first, first + len(steps))
        read = dict.fromkeys(v for step in steps for v in step.reads)
        inputs = tuple(v for v in read if v not in own)
        outputs = tuple(v for v in own if v in kept)
        places, scratch = _places(first, steps, natives, inputs, outputs)
        # Addresses of inputs, of outputs, of the scratch memory and of live weights.
        bases = len(inputs) + len(outputs) + 1
        live = [t for found in natives for t in live_of(found)]
        call = native.cpu().ConvSequence(bases + len(live))
        for number, step, found in zip(own, steps, natives, strict=True):
            maps = (step.x, step.other, number)
            at = [(-1, 0) if v is None else places[v] for v in maps]
            for _ in live_of(found):
                at.append((bases, 0))
                bases += 1
            found.add_to(call, at)
        of = [natives[v - first] for v in outputs]
        return cls(
            call,
            inputs,
            tuple((v, n.y_shape, n.y_strides) for v, n in zip(outputs, of, strict=True)),
            scratch,
            tuple(live),
            tuple(n.held for n in natives),
        )

    def __call__(self, values: list[Any], threads: int) -> None:
        for number, shape, strides in self.outputs:
            values[number] = torch.empty_strided(shape, strides, dtype=torch.float32, device=_CPU)
        scratch = native.empty((self.scratch,)) if self.scratch else None
        addresses = [values[v].data_ptr() for v in self.inputs]
        addresses += [values[v].data_ptr() for v, _, _ in self.outputs]
        addresses.append(0 if scratch is None else scratch.data_ptr())
        addresses += [t.data_ptr() for t in self.live]
        self.call.run(addresses, threads)


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """Copies values into another layout."""

    values: tuple[int, ...]
    layout: torch.memory_format

    def __call__(self, values: list[Any], _threads: int) -> None:
        for v in self.values:
            values[v] = values[v].contiguous(memory_format=self.layout)


Run = Call | Alone | Turn


def layout_of(
    program: Program, like: list[Tensor]
) -> tuple[list[Tensor], tuple[Many[Turn], Many[Turn]]]:
    """Values as they lie within the sequence: like these, or channels_last where that is predicted
    to take less, with what turns inputs and outputs."""
    maps = [t.dim() == 4 and not geometry.is_channels_last(t) and t.stride(1) != 1 for t in like]
    first = program.inputs
    # Images of few channels are read as they are.
    maps[:first] = [
        m and t.shape[1] > FEW_CHANNELS for m, t in zip(maps, like[:first], strict=False)
    ]
    if not any(maps):
        return like, ((), ())
    last = [
        torch.empty_like(t, memory_format=torch.channels_last) if turned else t
        for t, turned in zip(like, maps, strict=True)
    ]
    times = [[step.ns(values) for step in program.steps] for values in (like, last)]
    ends = (*range(first), *program.outputs)
    turned = tuple(v for v in ends if maps[v])
    extra = TURN_NS * sum(like[v].numel() for v in turned)
    if not sum(times[1]) + extra < sum(times[0]):  # NaN: nothing is known
        return like, ((), ())
    before, after = ([v for v in turned if (v < first) is early] for early in (True, False))
    return last, (_turns(before, torch.channels_last), _turns(after, torch.contiguous_format))


def _turns(values: list[int], layout: torch.memory_format) -> tuple[Turn, ...]:
    return (Turn(tuple(values), layout),) if values else ()


def live_of(found: Native | None) -> tuple[Tensor, ...]:
    """The weights that the native code reads where they lie."""
    return found.live if isinstance(found, NativeHead) else ()


def natives_of(program: Program, values: list[Tensor]) -> list[Native | None]:
    """What the native code is told of each step."""
    first = program.inputs
    return [s.native(values, values[first + i]) for i, s in enumerate(program.steps)]


def runs_of(program: Program, values: list[Tensor]) -> tuple[Run, ...]:
    """Native calls of as many steps as follow each other, each of a chain or a
    linear layer at least."""
    first = program.inputs
    steps, natives = program.steps, natives_of(program, values)
    found: list[Run] = []
    begin = 0
    while begin < len(steps):
        end = begin
        while end < len(steps) and natives[end] is not None:
            end += 1
        if any(isinstance(step.what, Chain | Head) for step in steps[begin:end]):
            outside = {v for step in (*steps[:begin], *steps[end:]) for v in step.reads}
            kept = outside | {*program.outputs}
            ready = [n for n in natives[begin:end] if n is not None]
            found.append(Call.made(first + begin, steps[begin:end], ready, kept))
        else:
            end = max(end, begin + 1)
            found += [
                Alone(steps[i], first + i, Lies.of(values[first + i])) for i in range(begin, end)
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
