"""torch.compile: one graph, compiled at most twice for any number of batch sizes."""

import time
from functools import cached_property

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mbm_kernels import nn
from mbm_kernels._core.op import OPS
from tests.tools.cases import ALL, MODULES, Model, assert_same

# The other functions are those that modules call.
NAMES = (*MODULES, "gru of lengths", "linear_cross_entropy", "contrastive_loss", "linear_topk")


@pytest.mark.parametrize("name", NAMES)
def test_batch_sizes_share_a_graph(name):
    torch._dynamo.reset()
    case = ALL[name]
    model, counter = Model(case, "cpu"), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for batch in (4, 6, 9):
        inputs = case.inputs(batch)
        assert_same(compiled(*inputs), model(*inputs))
    assert counter.frame_count <= 2


def test_what_a_compiler_cannot_trace_is_computed_before():
    """functools.cached_property takes a lock at its first use in Python 3.11."""
    for op in OPS.values():
        names = [n for n, x in vars(type(op.spec)).items() if isinstance(x, cached_property)]
        assert names
        assert set(names) <= vars(op.spec).keys()


def test_six_layers_are_traced_in_seconds():
    """Inductor's share does not grow with the layers: each is one call of an operation."""
    torch._dynamo.reset()
    model, x = nn.GRU(16, 32, num_layers=6, backend="cpu"), torch.randn(5, 2, 16)
    expected = model(x)
    graphs = CompileCounterWithBackend("aot_eager")
    start = time.process_time()
    assert_same(torch.compile(model, backend=graphs, fullgraph=True)(x), expected)
    assert time.process_time() - start < 10
    calls = [node.target for node in graphs.graphs[0].graph.nodes if node.op == "call_function"]
    assert calls.count(OPS["gru"].registered) == 6
