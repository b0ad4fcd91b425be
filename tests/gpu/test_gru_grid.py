"""gru's programs and blocks that wait for one another, which the interpreter cannot show."""

import pytest
import torch

from mbm_kernels._core import dispatch
from mbm_kernels.testing import Case
from tests.ops.test_gru import TestGru as Gru
from tests.ops.test_gru import sizes

from .test_on_hardware import DEVICE, call, on_device

SUITE = Gru()
DTYPES = (torch.float32, torch.bfloat16)


def runs(backend):
    reason = dispatch.why_not("gru", backend, DEVICE, torch.float32)
    return pytest.param(
        backend, marks=pytest.mark.skipif(reason is not None, reason=f"{backend}: {reason}")
    )


BACKENDS = [runs("triton"), runs("cuda")]
CASES = [
    pytest.param(sizes(20, 1, 64, 256), {}, id="16 programs, one row"),
    pytest.param(sizes(9, 33, 40, 512), {"reverse": True}, id="3 groups of 32 programs"),
    pytest.param(sizes(5, 64, 64, 1024), {}, id="units beyond a group's programs"),
    pytest.param(sizes(9, 70, 20, 1000), {"ragged": True}, id="groups of several tiles of rows"),
    pytest.param(sizes(7, 300, 20, 272), {}, id="rows beyond the groups"),
    pytest.param(sizes(12, 40, 30, 500), {"ragged": True}, id="lengths, units past a block"),
]


def inputs_of(shape, options, dtype):
    given = dict(options)
    if given.pop("ragged", False):
        given["lengths"] = [(7 * b) % (shape["T"] + 1) for b in range(shape["B"])]
    return SUITE.inputs(Case("", shape, given), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "options"), CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gru_grid_is_within_the_budget(backend, shape, options, dtype):
    inputs = inputs_of(shape, options, dtype)
    SUITE.check_forward(inputs, backend)
    SUITE.check_backward(inputs, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [512, 1024])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gru_grid_never_reads_a_state_too_early(backend, hidden, dtype):
    """A race would show as another result in one of many runs, beside other work on the device."""
    case = Case("", sizes(64, 48, 32, hidden))
    inputs = on_device(SUITE, case, dtype)
    first = call(SUITE, inputs, backend)
    other = torch.randn(2048, 2048, device=DEVICE)
    stream = torch.cuda.Stream()
    for _ in range(50):
        with torch.cuda.stream(stream):
            other = torch.tanh(other @ other)
        for a, b in zip(call(SUITE, inputs, backend), first, strict=True):
            assert torch.equal(a, b)
