"""The search loop as a CUDA graph: recorded once for a shape and place of weights, then replayed.

A step of stock PyTorch is some thirty launches of a few microseconds each, so that the host is what
takes the time. Here `STEPS` of them are one replay, after which the host looks whether all captions
have ended. A loop of another length ends with a shorter graph.

What is recorded reads and writes fixed memory: the images, the word table and what is carried are
copied in, the traces copied out. Parameters are read where they lie, as they are at that time;
their addresses and layouts are part of the key. Graphs hold no reference to the model, and go with
it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from mbm_kernels._core import dispatch
from mbm_kernels._core.tracing import is_plain
from mbm_kernels.models.search_state import (
    Carry,
    Decoder,
    Search,
    StepModel,
    Trace,
    joined,
    stacked,
)

STEPS = 8  # of one graph: an early end costs 7 steps at most, of 20 us each
MOST_KEPT = 8  # graphs of one model: shapes that are asked for in turn
Replay = Callable[[], None]
Tensors = TypeVar("Tensors", bound=tuple[Tensor, ...])


def why_not(model: StepModel, device: torch.device) -> str | None:
    """Why this call cannot be captured as a CUDA graph, or None."""
    if device.type != "cuda":
        return f"tensors are on {device}; graphs are CUDA's"
    if model.layers != "mbm":
        return "the stock model is what is compared with"
    if torch.is_autocast_enabled("cuda"):
        return "autocast keeps casts of the weights for as long as it lasts only"
    if torch.cuda.is_current_stream_capturing():
        return "the caller records a graph of its own"
    parameters = list(model.parameters())
    if not is_plain(parameters):
        return "a mode, a compiler or a tensor subclass is at work"
    if any(p.device != device for p in parameters):
        return "parameters are on several devices"
    return None


def capture(body: Callable[[], None]) -> Replay:
    """`body` recorded by torch.cuda.graph, after a run for what is set up at first use."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        body()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph.replay


class Piece:
    """`steps` steps of search from fixed memory to fixed memory."""

    def __init__(self, how: Search, decoder: Decoder, carry: Carry, steps: int) -> None:
        self.trace: Trace

        def body() -> None:
            reached, traces = carry, []
            for _ in range(steps):
                reached, trace = how.step(decoder, reached)
                traces.append(trace)
            for kept, new in zip(carry, reached, strict=True):
                kept.copy_(new)
            self.trace = stacked(traces)

        before = [x.clone() for x in carry]
        self.replay = capture(body)
        for kept, old in zip(carry, before, strict=True):
            kept.copy_(old)


class Loop:
    """Pieces for one shape, and the memory that they share."""

    def __init__(self, decoder: Decoder, carry: Carry) -> None:
        self.pictures = _own(decoder.pictures)
        self.carry = _own(carry)
        self.pieces: dict[int, Piece] = {}

    def run(
        self, how: Search, decoder: Decoder, carry: Carry, max_length: int
    ) -> tuple[Carry, Trace]:
        for kept, new in zip(
            (*self.pictures, *self.carry), (*decoder.pictures, *carry), strict=True
        ):
            kept.copy_(new)
        traces, left = [], max_length
        while left > 0:
            steps = min(STEPS, left)
            if steps not in self.pieces:
                own = decoder.for_pictures(self.pictures)
                self.pieces[steps] = Piece(how, own, self.carry, steps)
            piece = self.pieces[steps]
            piece.replay()
            traces.append(_own(piece.trace))
            left -= steps
            if bool(self.carry.done.all()):
                break
        return _own(self.carry), joined(traces)


def _own(tensors: Tensors) -> Tensors:
    return type(tensors)(*(x.clone(memory_format=torch.contiguous_format) for x in tensors))


Key = tuple[Any, ...]
_loops: weakref.WeakKeyDictionary[StepModel, dict[Key, Loop]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()  # two threads would share a graph's memory


def run(
    model: StepModel,
    how: Search,
    decoder: Decoder,
    carry: Carry,
    max_length: int,
) -> tuple[Carry, Trace]:
    """What `generation.loop` returns; steps after the end of every caption change nothing."""
    placed = tuple((p.data_ptr(), p.shape, p.stride(), p.dtype) for p in model.parameters())
    shapes = tuple((x.shape, x.dtype, x.device) for x in (*decoder.pictures, *carry))
    key = (placed, shapes, dispatch.state(), torch.get_float32_matmul_precision())
    with _lock:
        loops = _loops.setdefault(model, {})
        for stale in [k for k in loops if k[0] != placed]:
            del loops[stale]
        if key not in loops and len(loops) >= MOST_KEPT:
            del loops[next(iter(loops))]
        loop = loops.setdefault(key, Loop(decoder, carry))
        return loop.run(how, decoder, carry, max_length)
