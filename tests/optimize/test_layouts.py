"""Sequences that are channels_last inside, whatever their inputs and outputs are."""

import copy

import pytest
import torch
from torch import nn

from mbm_kernels.ops.conv_bias_act import geometry
from mbm_kernels.optimize import runs
from mbm_kernels.optimize.parity import stock_form
from tests.optimize.models import OfBlocks, ResNet, optimized, sequences, warmed
from tests.optimize.test_gating import Gated, assert_within_twice_torch


@pytest.fixture(autouse=True)
def turned(monkeypatch):
    """channels_last is predicted to take less."""

    def ns(step, values):
        return 1.0 + (not geometry.is_channels_last(values[step.x]))

    monkeypatch.setattr(runs.Step, "ns", ns)
    monkeypatch.setattr(runs, "TURN_NS", 0.0)


def kinds_of_runs(model):
    (found,) = sequences(model)
    return [type(run).__name__ for run in found._ready[0].runs]


def branches(self, x):
    """Inputs and results of many channels, read in and outside of the sequence."""
    x = x.mul(2)
    y = self.a(x).relu()
    z = (self.b(y) + y).relu()
    return {"y": y, "w": (self.c(z) + x).relu(), "x": x}


class TestValues:
    @pytest.mark.usefixtures("isa")
    @pytest.mark.parametrize(
        ("make", "kinds"),
        [(ResNet, ["Call", "Turn"]), (Gated, ["Call"])],
        ids=["ResNet", "Gated"],
    )
    def test_of_a_model(self, make, kinds):
        model, x = warmed(make()), torch.randn(2, 3, 33, 31)
        with torch.no_grad():
            stock, truth = model(x), copy.deepcopy(model).double()(x.double())
            optimized(model, x)
            found = model(x)
        assert kinds_of_runs(model) == kinds
        assert_within_twice_torch(found, stock, truth)

    @pytest.mark.usefixtures("isa")
    def test_inputs_and_results_are_turned(self):
        layers = {name: nn.Conv2d(9, 9, 3, padding=1) for name in "abc"}
        model, x = OfBlocks(branches, **layers).eval(), torch.randn(2, 9, 8, 7)
        with torch.no_grad():
            expected = model(x)
            optimized(model, x)
            found = model(x)
        assert kinds_of_runs(model) == ["Turn", "Call", "Turn"]
        for name, value in expected.items():
            assert found[name].stride() == value.stride()
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("size", [(0, 9, 8, 7), (1, 9, 8, 7), (3, 9, 1, 1), (2, 9, 1, 5)])
    def test_of_other_sizes(self, size):
        layers = {name: nn.Conv2d(9, 9, 3, padding=1) for name in "abc"}
        model = OfBlocks(branches, **layers).eval()
        stock = copy.deepcopy(model)
        optimized(model, torch.randn(2, 9, 8, 7))
        x = torch.randn(size)
        with torch.no_grad():
            for _ in range(3):
                for name, value in stock(x).items():
                    found = model(x)[name]
                    assert found.stride() == value.stride()
                    torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
    def test_between_steps_that_pytorch_runs(self, memory):
        model = warmed(ResNet())
        x = torch.randn(2, 3, 40, 40).contiguous(memory_format=memory)
        optimized(model, x)
        (found,) = sequences(model)
        for chain in (found.chains[0], found.chains[3]):
            chain.backend = "torch"
        truth = stock_form(copy.deepcopy(model))
        with torch.no_grad():
            for _ in range(4):
                torch.testing.assert_close(model(x), truth(x), rtol=1e-4, atol=1e-4)
        kinds = kinds_of_runs(model)
        assert [k for k in kinds if k != "Turn"] == ["Alone", "Call", "Alone", "Call"]

    def test_what_pytorch_returns_in_another_layout(self, monkeypatch):
        model, x = warmed(ResNet()), torch.randn(2, 3, 40, 40)
        optimized(model, x)
        (found,) = sequences(model)
        found.chains[2].backend = "torch"
        right = type(found.chains[2]).__call__

        def other(self, *given):
            y = right(self, *given)
            return y.contiguous() if self.backend == "torch" else y

        monkeypatch.setattr(type(found.chains[2]), "__call__", other)
        truth = stock_form(copy.deepcopy(model))
        with torch.no_grad():
            for _ in range(4):
                torch.testing.assert_close(model(x), truth(x), rtol=1e-4, atol=1e-4)
        assert "Alone" in kinds_of_runs(model)
