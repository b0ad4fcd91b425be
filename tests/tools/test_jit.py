"""torch.jit.trace and torch.jit.script."""

import pytest
import torch

import mbm_kernels
from mbm_kernels import nn
from mbm_kernels._core.op import OPS
from tests.tools.cases import ALL, MODULES, Model, assert_same, each_backend, each_case

LOSSES = [name for name, op in OPS.items() if op.saves_each]  # their schema has a bool[]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@each_backend
@each_case
def test_a_trace_holds_for_other_batches_or_is_refused(name, backend):
    case = ALL[name]
    model = Model(case, backend).eval()
    if backend == "cpu" and name in (*LOSSES, "LinearDistillationLoss"):
        with pytest.raises(mbm_kernels.BackendUnavailableError, match=r"use backend='auto'"):
            torch.jit.trace(model, case.inputs(4))
        return
    traced = torch.jit.trace(model, case.inputs(4))
    for batch in (2, 9):
        inputs = case.inputs(batch)
        assert_same(traced(*inputs), model(*inputs))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_holds_for_other_images_and_sequences():
    conv, gru = nn.Conv2d(3, 4, 3, stride=2, backend="cpu"), nn.GRU(3, 4, backend="cpu")
    traced = torch.jit.trace(conv, torch.randn(2, 3, 8, 8))
    x = torch.randn(2, 3, 11, 5)
    assert_same(traced(x), conv(x))
    traced = torch.jit.trace(gru, torch.randn(5, 2, 3))
    x = torch.randn(8, 2, 3)
    assert_same(traced(x), gru(x))


@pytest.mark.filterwarnings("ignore")  # torch deprecates it
@pytest.mark.parametrize("name", MODULES)
def test_script_is_refused_with_the_remedy(name):
    model = torch.nn.Sequential(torch.nn.Identity(), MODULES[name].make("auto"))
    with pytest.raises(RuntimeError, match=rf"jit\.script: got {name}, run by .*revert\(\)"):
        torch.jit.script(model)
    assert type(model[1]) is getattr(nn, name)


@pytest.mark.filterwarnings("ignore")
def test_script_is_refused_of_chains():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
    report = mbm_kernels.optimize(model)
    with pytest.raises(RuntimeError, match=r"jit\.script: got Sequential, run by .*revert\(\)"):
        torch.jit.script(model)
    report.revert()
    torch.jit.script(model)
