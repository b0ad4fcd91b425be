"""torch.compile: one graph, compiled at most twice for any number of batch sizes."""

import resource

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mbm_kernels import nn
from tests.tools.cases import ALL, Model, assert_same, each_case


@each_case
def test_batch_sizes_share_a_graph(name):
    torch._dynamo.reset()
    case = ALL[name]
    model, counter = Model(case, "cpu"), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for batch in (4, 6, 9, 3):
        inputs = case.inputs(batch)
        assert_same(compiled(*inputs), model(*inputs))
    assert counter.frame_count <= 2


def _seconds():
    """CPU time of this process and of the compilers that it ran."""
    spent = [resource.getrusage(r) for r in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(s.ru_utime + s.ru_stime for s in spent)


@pytest.mark.slow
def test_six_layers_compile_in_seconds():
    torch._dynamo.reset()
    model, x = nn.GRU(16, 32, num_layers=6, backend="cpu"), torch.randn(5, 2, 16)
    expected = model(x)
    with torch._inductor.config.patch(compile_threads=1, force_disable_caches=True):
        torch.compile(lambda x: x.sin() + 1)(x)  # what the first compilation loads
        start = _seconds()
        assert_same(torch.compile(model, fullgraph=True)(x), expected)
    assert _seconds() - start < 15
