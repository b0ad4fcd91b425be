"""What only a GPU can show: CUDA graph capture, determinism, tf32. Not collected without one."""

import importlib

import pytest
import torch

from mbm_kernels._core import dispatch
from mbm_kernels._core.op import OPS, as_tuple
from mbm_kernels.bench.gpu.measure import no_synchronisation
from mbm_kernels.testing.suite import LENGTHS, OpSuite, flat_tensors, placed, with_leaves

DEVICE = torch.device("cuda")


def suite_of(op: str) -> OpSuite:
    """The operation's first that can run; a file may hold variants and a common base."""
    module = importlib.import_module(f"tests.ops.test_{op}")
    return next(
        value()
        for name, value in vars(module).items()
        if name.startswith("Test") and issubclass(value, OpSuite) and value.op == op
    )


PAIRS = [
    pytest.param(op, backend, id=f"{op}-{backend}")
    for op in OPS
    for backend in ("triton", "cuda")
    if dispatch.why_not(op, backend, DEVICE, torch.float32) is None
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_device(suite: OpSuite, case, dtype, seed=0):
    """Lengths too: from the CPU they would be copied, which waits and cannot be captured."""
    inputs = placed(suite.inputs(case, dtype, seed), DEVICE)
    given = {n: inputs[n].to(DEVICE) for n in LENGTHS if inputs.get(n) is not None}
    return {**inputs, **given}


def call(suite: OpSuite, inputs, backend):
    with torch.no_grad():
        outputs = type(suite).function(**inputs, backend=backend)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def call_and_gradients(suite: OpSuite, inputs, backend):
    given, leaves = with_leaves(inputs, suite.diff)
    outputs = as_tuple(type(suite).function(**given, backend=backend))
    made = [o for o in outputs if o.requires_grad]
    ones = [torch.ones_like(o) for o in made]
    found = torch.autograd.grad(made, list(leaves.values()), ones, allow_unused=True)
    return (*(o.detach() for o in outputs), *(g for g in found if g is not None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "backend"), PAIRS)
def test_runs_agree_to_the_bit(op, backend, dtype, monkeypatch):
    """Gradients too; of cuDNN's convolutions those that are deterministic."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    suite = suite_of(op)
    for case in suite.cases[:3]:
        inputs = on_device(suite, case, dtype)
        first = call_and_gradients(suite, inputs, backend)
        for _ in range(3):
            for a, b in zip(call_and_gradients(suite, inputs, backend), first, strict=True):
                assert torch.equal(a.nan_to_num(), b.nan_to_num()), case


@pytest.mark.parametrize(("op", "backend"), PAIRS)
def test_forward_is_captured_by_a_graph(op, backend):
    suite = suite_of(op)
    inputs = on_device(suite, suite.cases[0], torch.float32)
    other = on_device(suite, suite.cases[0], torch.float32, seed=5)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(suite, inputs, backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call(suite, inputs, backend)
    expected = call(suite, other, backend)

    for x, y in zip(flat_tensors(inputs), flat_tensors(other), strict=True):
        if x.is_cuda:
            x.copy_(y)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(outputs, expected, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize(("op", "backend"), PAIRS)
def test_tf32_is_within_the_budget_of_stock_tf32(op, backend):
    suite = suite_of(op)
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        for case in suite.cases[:2]:
            suite.check_forward(suite.inputs(case, torch.float32), backend)
            suite.check_backward(suite.inputs(case, torch.float32), backend)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul
        torch.backends.cudnn.allow_tf32 = cudnn


@pytest.mark.parametrize(("op", "backend"), PAIRS)
def test_a_call_does_not_wait_for_the_device(op, backend):
    """No host synchronisation in forward or backward."""
    suite = suite_of(op)
    inputs = on_device(suite, suite.cases[0], torch.float32)
    call_and_gradients(suite, inputs, backend)  # compiles
    with no_synchronisation():
        call_and_gradients(suite, inputs, backend)
