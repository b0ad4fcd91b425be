"""What runs where, asked of the operations themselves: `python -m tests.docs.support`.

The page is the same on every machine with the pinned torch: the instruction set and the GPU that a
call would need are assumed, not looked for.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import profiler

import mbm_kernels
from mbm_kernels._core import cost, cuda_launch, dispatch, env, triton_launch
from mbm_kernels._core.op import OPS
from mbm_kernels.testing.inputs import Inputs, map_tensors
from mbm_kernels.testing.layouts import LAYOUTS, relayout
from mbm_kernels.testing.suite import OpSuite
from tests.docs import pages
from tests.ops.test_drawn import suite_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CPU = torch.device("cpu")
VAST = 10**9  # more than any limit on a size
KERNEL, NAMED, REFUSED, RUNS, NOT = "kernel", "by name", "refused", "yes", "no"

TEXT = """# What runs where

Written by `python -m tests.docs.support`, which asks the operations; a test holds this page to it.

## By dtype, instruction set and pass

One word for the forward and the backward pass, two where they differ.

- **kernel**: `auto` compares the predicted times of the kernel and of PyTorch, call by call;
  `backend="cpu"` always runs the kernel.
- **by name**: the kernel runs if it is asked for; `auto` takes PyTorch.
- **refused**: there is no kernel. Asking for it raises `BackendUnavailableError`; `auto` takes
  PyTorch.

CPU kernels compute in float32 and round 16-bit results when they store them. The GPU kernels are
compiled and tested without a GPU, **not measured on hardware**: `auto` takes PyTorch there.
The last column says whether `backend="torch"` runs on a CPU in that dtype, both passes.
{internal}

{dtypes}
Second derivatives (`create_graph=True`) and `torch.func` transforms come from the definition in
plain PyTorch for every backend. Forward-mode derivatives are PyTorch's; a kernel asked for by name
refuses them.

## By layout

What the CPU kernel does with float32 tensors that are not contiguous.
**as it is**: it reads the tensors where they lie. **copied**: some are made contiguous first.

{layouts}
- *channels_last*: `torch.channels_last`, for images alone.
- *transposed*: the last two dimensions are stored swapped. *strided*: a gap after each element.
- *offset*: the tensor starts inside its storage. *expanded*: the first dimension has stride 0.

## Limits of single backends

{limits}"""


def page() -> str:
    internal = [f"`{op}`" for op in sorted(OPS) if op not in mbm_kernels.__all__]
    return TEXT.format(
        internal=f"{' and '.join(internal)} are called by modules and models, not by users.",
        dtypes=dtype_table(),
        layouts=layout_table(),
        limits=limit_table(),
    )


@contextmanager
def assuming(isa: str | None = None) -> Iterator[None]:
    """The hardware that each backend needs is there, and kernels win wherever `auto` may take
    them: on `isa`, if constants can hold for it."""

    class Wins(cost.Table):
        def predict(self, op: str, sizes: cost.Sizes, threads: int) -> cost.Predicted:
            return cost.Predicted(1.0, 2.0, 1.0)

    table = Wins("assumed", {}, {}, {}) if isa in cost.LANES else None
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(cost, "table", return_value=table))
        stack.enter_context(mock.patch.object(cuda_launch, "_emulates", True))
        stack.enter_context(mock.patch.object(dispatch, "_defaults", {}))
        stack.enter_context(triton_launch.record())
        dispatch.forget_choices()
        try:
            yield
        finally:
            dispatch.forget_choices()


def inputs_of(suite: OpSuite, dtype: torch.dtype = torch.float32) -> Inputs:
    return suite.inputs(suite.cases[0], dtype)


def sizes_of(op: str) -> dict[str, int]:
    """The sizes of a small call, as dispatch sees them."""
    suite = suite_of(op)
    with dispatch.observed() as seen:
        suite.run(inputs_of(suite), "torch")
    return {name: size for call in seen if call.op == op for name, size in call.sizes.items()}


def cell(op: str, backend: str, dtype: torch.dtype, isa: str | None, sizes: dict[str, int]) -> str:
    """Of a forward and a backward pass."""

    def one(training: bool) -> str:
        if training and not OPS[op].diff:
            return "-"
        with assuming(isa):
            if dispatch.why_not(op, backend, CPU, dtype, **sizes):
                return REFUSED
            module = dispatch.load_backend(op, backend)
            if training and not hasattr(module, "bwd"):
                return REFUSED
            taken = dispatch.select(op, "auto", CPU, dtype, {**sizes, "training": int(training)})
        return KERNEL if taken == backend else NAMED

    forward, backward = one(False), one(True)
    return forward if forward == backward else f"{forward} / {backward}"


def stock_runs(op: str, dtype: torch.dtype) -> str:
    suite = suite_of(op)
    inputs = inputs_of(suite, dtype)
    try:
        outputs = suite.define(inputs)
        suite.gradients(lambda given: suite.run(given, "torch"), inputs, ones_like(outputs))
    except RuntimeError:
        return NOT
    return RUNS


def ones_like(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [torch.ones_like(output) for output in outputs]


def dtype_table() -> str:
    columns = ["operation", "dtype", *(f"CPU, {isa}" for isa in env.ISAS)]
    columns += ["Triton", "CUDA C++", "PyTorch"]
    rows = []
    for op in sorted(OPS):
        sizes = sizes_of(op)
        dtypes: dict[tuple[str, ...], list[str]] = {}  # of the same cells
        for dtype in DTYPES:
            cells = [cell(op, "cpu", dtype, isa, sizes) for isa in env.ISAS]
            cells += [cell(op, gpu, dtype, None, sizes) for gpu in ("triton", "cuda")]
            known = dtypes.setdefault((*cells, stock_runs(op, dtype)), [])
            known.append(str(dtype).removeprefix("torch."))
        for number, (cells, names) in enumerate(dtypes.items()):
            rows.append(["" if number else f"`{op}`", ", ".join(names), *cells])
    return pages.table(columns, rows)


def copies(run: Callable[[], Any]) -> int:
    """How many tensors a call copies."""
    run()  # what is packed or made once
    with profiler.profile(use_kineto=False) as profile:
        run()
    return sum(event.name == "aten::copy_" for event in profile.function_events)


def layout_cell(suite: OpSuite, inputs: Inputs, lay: Callable[[Tensor], Tensor]) -> str:
    def run(inputs: Inputs, backward: bool) -> int:
        if not backward:
            return copies(lambda: suite.run(inputs, "cpu"))
        grads = ones_like(suite.run(inputs, "cpu"))
        return copies(lambda: suite.gradients(lambda g: suite.run(g, "cpu"), inputs, grads))

    given = map_tensors(inputs, lay)
    said = []
    for backward in (False, True):
        if backward and not suite.diff:
            said.append("-")
            continue
        more = run(given, backward) > run(inputs, backward)
        said.append("copied" if more else "as it is")
    return said[0] if said[0] == said[1] else " / ".join(said)


def layout_table() -> str:
    rows = []
    for op in sorted(OPS):
        suite = suite_of(op)
        inputs = inputs_of(suite)
        last = layout_cell(suite, inputs, channels_last) if op == "conv_bias_act" else ""
        others = [layout_cell(suite, inputs, lambda x, at=at: relayout(x, at)) for at in LAYOUTS]
        rows.append([f"`{op}`", last, *others])
    return pages.table(["operation", "channels_last", *LAYOUTS], rows)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def limits_of(op: str, backend: str) -> list[str]:
    """Why a call of a vast size is refused, size by size, each reason once."""
    sizes = sizes_of(op)
    found: dict[str, None] = {}
    with assuming():
        for name in sizes:
            reason = dispatch.why_not(op, backend, CPU, torch.float32, **{**sizes, name: VAST})
            if reason:
                found[reason.removesuffix(f", not {VAST}")] = None
    return list(found)


def limit_table() -> str:
    rows = [
        [f"`{op}`", backend, reason]
        for op in sorted(OPS)
        for backend in ("cpu", "triton", "cuda")
        if backend in dispatch._tables[op].backends
        for reason in limits_of(op, backend)
    ]
    return pages.table(["operation", "backend", "a larger call is refused"], rows)


if __name__ == "__main__":
    pages.write("support.md", page)
