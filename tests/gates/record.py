"""Writes down the native calls of operations, for replay.py.

    python -m tests.gates.record RECORDS --isa avx2 --examples 12 --threads 3

Every operation with a CPU backend is called, forward and backward, on the cases of its own tests,
sizes of 0 among them, on those of mbm_kernels.testing.strata, which reach each plan of its kernels
and are called without gradients too, and over arguments drawn from the strategies of
mbm_kernels.testing.cases. Incoming gradients take every layout in turn. A new operation is recorded
without a change here. Every fourth drawn call is made again with indices, lengths among them, that
are wrong: a dispatch mode keeps them from being looked at.
"""

import argparse
import bisect
import ctypes
import importlib
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mbm_kernels
from mbm_kernels._core import native
from mbm_kernels._core.op import OPS, as_tuple
from mbm_kernels.testing import cases, strata
from mbm_kernels.testing.hiding import Hiding
from mbm_kernels.testing.inputs import Inputs, flat_tensors, map_tensors
from mbm_kernels.testing.layouts import LAYOUTS, relayout
from mbm_kernels.testing.suite import OpSuite

ADDRESSES_FROM = 2**32  # no size and no stride is as large
COMMON = "common"  # stands for the functions bound for tests, which no operation calls
DENSE, NUMBER = "dense", "one number"  # that of sum().backward(): every stride is 0
SPOILT = "a NaN in one"
GRADIENTS = (DENSE, *LAYOUTS, NUMBER, SPOILT)
WRONG = (-1, 2**20, 2**40, -(2**63), 2**63 - 1)
SETTERS = ("set_isa", "isa", "best_isa", "runs_isa")


class Recorder:
    """Stands for the extension: passes each call on and writes it down with its buffers."""

    def __init__(self, module: ModuleType, file: BinaryIO):
        self.module, self.file = module, file
        self.label = ""
        self.calls: dict[str, int] = {}
        self.storages: dict[int, torch.UntypedStorage] = {}

    def note(self, tensor: Tensor) -> None:
        """Kept until `forget`, so that its address means this storage only."""
        storage = tensor.untyped_storage()
        if storage.nbytes() > 0:
            self.storages[storage.data_ptr()] = storage

    def forget(self) -> None:
        """Drops what nobody else holds: a backend may keep a tensor and its address for later."""
        held = {a: s for a, s in self.storages.items() if torch._C._storage_Use_Count(s._cdata) > 1}
        self.storages = held

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.module, name)
        if name in SETTERS or isinstance(function, type):
            return function

        def call(*arguments: Any) -> Any:
            starts = sorted(self.storages)
            used: list[int] = []

            def written(value: Any) -> Any:
                if isinstance(value, (list, tuple)):
                    return type(value)(written(v) for v in value)
                if type(value).__module__.endswith("_C_cpu"):
                    return ("#", type(value).__name__, int(value))
                if type(value) is not int or value < ADDRESSES_FROM:
                    return value
                start = starts[bisect.bisect_right(starts, value) - 1] if starts else 0
                storage = self.storages.get(start)
                if storage is None or not 0 <= value - start <= storage.nbytes():
                    raise ValueError(f"{name}: {value:#x} is in no tensor asked for its address")
                if start not in used:
                    used.append(start)
                return ("@", used.index(start), value - start)

            tree = written(arguments)
            buffers = [ctypes.string_at(s, self.storages[s].nbytes()) for s in used]
            result = function(*arguments)
            kept = result if isinstance(result, (int, tuple)) else None
            fields = (self.label, self.module.isa(), name, tree, buffers, kept)
            pickle.dump(fields, self.file, pickle.HIGHEST_PROTOCOL)
            self.calls[name] = self.calls.get(name, 0) + 1
            return result

        return call


@contextmanager
def recording(path: Path, threads: int = 1) -> Iterator[Recorder]:
    """Within it native calls go through a Recorder and are told of `threads` threads."""
    module, real_cpu = native.cpu(), native.cpu
    real_pointer, real_threads = Tensor.data_ptr, torch.get_num_threads
    with path.open("wb") as file:
        recorder = Recorder(module, file)

        def data_ptr(tensor: Tensor) -> int:
            recorder.note(tensor)
            return real_pointer(tensor)

        native.cpu = lambda: recorder  # type: ignore[assignment,return-value]
        Tensor.data_ptr = data_ptr  # type: ignore[method-assign]
        torch.get_num_threads = lambda: threads
        try:
            yield recorder
        finally:
            native.cpu = real_cpu
            Tensor.data_ptr = real_pointer  # type: ignore[method-assign]
            torch.get_num_threads = real_threads


def run(
    recorder: Recorder,
    op: str,
    inputs: Inputs,
    wanted: Callable[[int], bool] = lambda i: True,
    layout: str = DENSE,
    function: Callable[..., Any] | None = None,
) -> None:
    """Forward and backward by the CPU kernels; gradients of those floating tensors `wanted`, from
    gradients of the outputs in that layout. For additive attention a second forward, labelled so,
    with keys made of its key."""
    function = function or getattr(mbm_kernels.ops, op)
    leaves: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        x = x.detach()
        if x.is_floating_point() and wanted(len(leaves)):
            x.requires_grad_()
        leaves.append(x)
        return x

    inputs = map_tensors(inputs, leaf)
    outputs = as_tuple(function(**inputs, backend="cpu"))
    generator = torch.Generator().manual_seed(1)
    pairs = [(o, _gradient(o, layout, generator)) for o in outputs if o.requires_grad]
    if pairs:
        torch.autograd.grad(
            [o for o, _ in pairs],
            [x for x in flat_tensors(inputs) if x.requires_grad],
            [g for _, g in pairs],
            allow_unused=True,
        )
    if op == "additive_attention":
        recorder.label += ", keys"
        with torch.no_grad():
            keys = mbm_kernels.additive_attention_keys(inputs["key"], backend="cpu")
            function(**{**inputs, "key": keys}, backend="cpu")


def _gradient(output: Tensor, layout: str, generator: torch.Generator) -> Tensor:
    grad = torch.randn(output.shape, generator=generator)
    if layout == NUMBER:
        return torch.ones(()).expand(output.shape)
    if layout == SPOILT:
        grad.view(-1)[:1] = torch.nan
        return grad
    return grad if layout == DENSE else relayout(grad, layout)


class Unlooked(TorchDispatchMode):
    """Within it no value is checked, as under a FLOP counter."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def run_wrong(recorder: Recorder, op: str, inputs: Inputs) -> None:
    """As `run`, with WRONG in place of some of what int64 tensors hold."""

    def spoilt(x: Tensor) -> Tensor:
        if x.dtype != torch.int64 or x.numel() == 0:
            return x
        values = torch.tensor(WRONG)[torch.arange(x.numel()) % len(WRONG)].view(x.shape)
        return torch.where(torch.arange(x.numel()).view(x.shape) % 3 == 1, values, x)

    if any(x.dtype == torch.int64 for x in flat_tensors(inputs)):
        recorder.label += ", wrong indices"
        with Unlooked():
            run(recorder, op, map_tensors(inputs, spoilt))


def kernels() -> list[str]:
    return sorted(op for op in OPS if mbm_kernels.backends(op)["cpu"] is None)


def record_common(recorder: Recorder) -> None:
    for function in native.cpu().VectorFunction.__members__.values():
        for size in range(70):
            recorder.label = f"{function}, {size} elements"
            x, y = torch.linspace(-20, 20, size), torch.empty(size)
            native.cpu().vector_math(function, x.data_ptr(), y.data_ptr(), size)
            recorder.forget()
    for batch, channels, pixels in ((1, 1, 1), (2, 3, 49), (3, 17, 5), (1, 70, 33), (1, 33, 4100)):
        for last in (False, True):
            sizes = (batch, channels, pixels, last)
            recorder.label = f"planes {sizes}"
            x, y = torch.randn(batch, channels, pixels), torch.empty(batch, channels, pixels)
            factors = torch.randn(batch, channels)
            addresses = x.data_ptr(), factors.data_ptr(), y.data_ptr()
            native.cpu().plane_means(sizes, *addresses[:2], 3)
            for hardsigmoid in (False, True):
                native.cpu().scale_planes(sizes, hardsigmoid, *addresses, 3)
            recorder.forget()
    for activation, sizes in enumerate(((1, 1, 1), (5, 33, 70), (64, 1100, 31), (65, 7, 33))):
        recorder.label = f"linear head {sizes}"
        batch, features, outputs = sizes
        x, weight = torch.randn(batch, features), torch.randn(outputs, features)
        bias, y = torch.randn(outputs), torch.empty(batch, outputs)
        for plus in (0, bias.data_ptr()):
            weights = (weight.data_ptr(), plus)
            given = ((*sizes, activation), x.data_ptr(), weights, y.data_ptr())
            native.cpu().linear_head(*given, 3)
        recorder.forget()
    recorder.label = "teams of threads"
    for team, taken, waited in ((2, 100, 0), (2, 4_000_000, 3_000_000), (4, 4_000_000, 100)):
        native.cpu().note_team(team, taken, waited)
    native.cpu().granted_team(1)  # of more, that depends on what else runs
    recorder.label = "peak and scratch memory"
    native.cpu().peak_operations()
    native.cpu().peak_run(3, 2)
    native.cpu().release_scratch(2)


def record_drawn(recorder: Recorder, op: str, large: bool, examples: int) -> None:
    count = 0

    def each(drawn: cases.Drawn) -> None:
        nonlocal count
        recorder.label = f"{op}: {drawn}"
        # Every third time only some gradients: the pointers to the others are null.
        run(
            recorder,
            op,
            drawn.inputs,
            (lambda i: i % 2 == 0) if count % 3 == 2 else (lambda i: True),
            GRADIENTS[count % len(GRADIENTS)],
        )
        if count % 4 == 3:
            run_wrong(recorder, op, drawn.inputs)
        recorder.forget()
        count += 1

    cases.each_stratum(op, large, examples, each)


def suites(op: str) -> list[OpSuite]:
    """Those of the operation's tests that ask for its CPU kernels."""
    module = importlib.import_module(f"tests.ops.test_{op}")
    tests = [v for name, v in vars(module).items() if name.startswith("Test")]
    found = [v for v in tests if isinstance(v, type) and issubclass(v, OpSuite)]
    return [suite() for suite in found if suite.op == op]


def hidden(suite: Hiding) -> Iterator[tuple[str, Inputs, Callable[..., Any] | None]]:
    """NaN where nothing reads, and where some results do."""
    for case in suite.hiding_cases:
        inputs = suite.inputs(case, torch.float32)
        for spoilt in (suite.spoilt(inputs, torch.nan), *suite.partly_read(inputs)):
            yield f"{case.why}, NaN", spoilt, type(suite).function


def record_fixed(recorder: Recorder, op: str) -> None:
    """The cases of the operation's tests, with NaN behind its masks too, and its strata."""
    made: list[tuple[str, Inputs, Callable[..., Any] | None]] = []
    for suite in suites(op):
        for case in (*suite.cases, *suite.edge_cases):
            made.append((case.why, suite.inputs(case, torch.float32), type(suite).function))
        if isinstance(suite, Hiding):
            made += hidden(suite)
    of_strata = strata.of(op)
    made += [(what, inputs, None) for what, inputs in of_strata]
    for i, (what, inputs, function) in enumerate(made):
        recorder.label = f"{op}: {what}"
        run(recorder, op, inputs, layout=GRADIENTS[i % len(GRADIENTS)], function=function)
        recorder.forget()
    for what, inputs in of_strata:  # nothing is saved, and other kernels may run
        recorder.label = f"{op}, inference: {what}"
        run(recorder, op, inputs, wanted=lambda i: False)
        recorder.forget()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path)
    parser.add_argument("--isa", required=True)
    parser.add_argument("--examples", type=int, default=12, help="of each of the two sizes")
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--ops", nargs="*", default=kernels())
    given_arguments = parser.parse_args()
    native.cpu().set_isa(given_arguments.isa)
    with recording(given_arguments.records, given_arguments.threads) as recorder:
        for op in given_arguments.ops:
            if op == COMMON:
                record_common(recorder)
                continue
            record_fixed(recorder, op)
            for large in (False, True):
                record_drawn(recorder, op, large, given_arguments.examples)
    for name, calls in sorted(recorder.calls.items()):
        print(f"{name:40}{calls:6}")


if __name__ == "__main__":
    main()
