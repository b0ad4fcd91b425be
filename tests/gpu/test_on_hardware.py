"""What only a GPU can show: CUDA graph capture, determinism, tf32. Not collected without one."""

import importlib

import pytest
import torch

from mbm_kernels._core import dispatch
from mbm_kernels._core.op import OPS
from mbm_kernels.testing.suite import OpSuite, flat_tensors, placed

DEVICE = torch.device("cuda")


def suite_of(op: str) -> OpSuite:
    """The operation's first that can run; a file may hold variants and a common base."""
    module = importlib.import_module(f"tests.test_{op}")
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
    return placed(suite.inputs(case, dtype, seed), DEVICE)


def call(suite: OpSuite, inputs, backend):
    with torch.no_grad():
        outputs = type(suite).function(**inputs, backend=backend)
    return outputs if isinstance(outputs, tuple) else (outputs,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "backend"), PAIRS)
def test_runs_agree_to_the_bit(op, backend, dtype):
    suite = suite_of(op)
    for case in suite.cases[:3]:
        inputs = on_device(suite, case, dtype)
        first = call(suite, inputs, backend)
        for _ in range(3):
            for a, b in zip(call(suite, inputs, backend), first, strict=True):
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
    call(suite, inputs, backend)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(suite, inputs, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
