"""The kernels whose programs meet at a barrier, as far as one program after another can show."""

import pytest
import torch

from mbm_kernels._core import triton_launch
from mbm_kernels.gate import cases
from mbm_kernels.ops.gru import backend_triton
from mbm_kernels.testing import Case

from .test_gru import TestGru as Gru
from .test_gru import sizes

SUITE = Gru()
INTERPRETED = not torch.cuda.is_available()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_grid_kernels_at_any_size(monkeypatch, dtype, reverse):
    """Two blocks of rows and two of units, without the kernels for few units."""
    monkeypatch.setattr(backend_triton, "ONE_PROGRAM", dict.fromkeys(triton_launch.DTYPES, 0))
    lengths = [3, 0, 2, 1] * 4 + [3]
    inputs = SUITE.inputs(Case("", sizes(3, 17, 5, 19), {"lengths": lengths}), dtype)
    inputs["reverse"] = reverse
    SUITE.check_forward(inputs, "triton")
    SUITE.check_backward(inputs, "triton")


def kept_by(dtype, rows):
    """The configuration of a launch that keeps weights and takes so many rows."""

    def config(kernel, *_):
        named = str(dtype).removeprefix("torch.")
        shape = {"BLOCK_B": rows, "PARTS": 8}.items()
        return next(
            c for c in kernel.configs if named in c.dtypes and shape <= dict(c.constants).items()
        )

    return config


@pytest.mark.skipif(not INTERPRETED, reason="test_gru runs them on a device as they are")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("batch", "rows"), [(3, 16), (17, 16), (35, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_kept_by_a_program(monkeypatch, reverse, batch, rows, dtype):
    """One program of the form that keeps its weights, which needs a device of some size."""
    monkeypatch.setattr(backend_triton, "ONE_PROGRAM", dict.fromkeys(triton_launch.DTYPES, 0))
    monkeypatch.setattr(triton_launch.Kernel, "config", kept_by(dtype, rows))
    case = Case("", sizes(3, batch, 5, 13), {"lengths": [*([3, 1, 2, 0] * 9)[: batch - 1], 2]})
    inputs = SUITE.inputs(case, dtype)
    inputs["reverse"] = reverse
    SUITE.check_forward(inputs, "triton")
    SUITE.check_backward(inputs, "triton")


@pytest.mark.parametrize("batch", [17, 70])
def test_weights_read_once_for_more_rows(monkeypatch, batch):
    """More rows than 16 a group, W_hh from cache; one group in the interpreter."""
    monkeypatch.setattr(backend_triton, "ONE_PROGRAM", dict.fromkeys(triton_launch.DTYPES, 0))
    inputs = SUITE.inputs(Case("", sizes(3, batch, 5, 19), {}), torch.bfloat16)
    if INTERPRETED:
        kernel = triton_launch.kernel("gru", "grid_forward")
        few = {"H": 19, "rows": batch, "tf32": False, "multiprocessors": 1, "shared_kib": 0}
        assert dict(kernel.config(torch.bfloat16, few).constants)["BLOCK_B"] == 64
    SUITE.check_forward(inputs, "triton")
    SUITE.check_backward(inputs, "triton")


def tf32_of(precision, case):
    """What a launch is told where cuDNN may round factors so."""
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = precision
    try:
        launches = case.record(torch.float32)
        return {launch.constexprs["TF32"] for launch in launches}
    finally:
        torch.backends.cudnn.rnn.fp32_precision = before


def test_tf32_is_cudnn_s_to_allow():
    for hidden in (32, 512):
        case = cases.StaticCase("gru", "", cases.gru(32, hidden))
        assert tf32_of("tf32", case) == {True}
        assert tf32_of("ieee", case) == {False}
        assert {launch.constexprs["TF32"] for launch in case.record(torch.bfloat16)} == {False}


@pytest.mark.parametrize("machine", [(1, 0), (40, 64), (84, 99), (108, 163), (132, 227)])
def test_programs_that_meet_run_at_once(monkeypatch, machine):
    """No launch has more programs than multiprocessors, and one that keeps weights has them all."""
    found = triton_launch.Machine(*machine)
    monkeypatch.setattr(triton_launch, "H100", found)
    for hidden in (33, 129, 200, 512, 513, 1024, 1025, 4000):
        for batch in (1, 16, 17, 300, 5000):
            for dtype in (torch.float32, torch.bfloat16):
                case = cases.StaticCase("gru", "", cases.gru(batch, hidden))
                for launch in case.record(dtype):
                    if not launch.kernel.name.startswith("grid"):
                        continue
                    programs, groups = launch.grid
                    assert programs >= 1
                    assert groups >= 1
                    assert programs * groups <= found.multiprocessors
                    constants = dict(launch.config.constants)
                    if constants["PARTS"] > 0:
                        assert programs * constants["BLOCK_U"] >= hidden
                        assert launch.constexprs["UNITS"] >= hidden
                        assert constants["PARTS"] == launch.config.num_warps
