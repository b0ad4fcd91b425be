"""Which chains are found in inference, and what of each."""

import pytest
import torch
from torch import nn

from mbm_kernels._core import dispatch
from mbm_kernels.ops.conv_bias_act.activations import TABLE as FUNCTIONS
from mbm_kernels.ops.conv_bias_act.geometry import ACTIVATIONS
from tests.optimize.models import (
    CALLS,
    Functional,
    OfBlocks,
    ResNet,
    check,
    conv,
)


class TestFound:
    def test_residual_network(self, runs):
        model = ResNet()
        x = torch.randn(2, 3, 32, 32)
        report = check(model, x, chains=6)
        was = {row.name: row.was for row in report.replaced}
        assert was["conv1"] == "Conv2d + BatchNorm2d + ReLU + MaxPool2d"
        assert was["layer1.1.conv2"] == "Conv2d + BatchNorm2d + add + ReLU"
        assert was["layer1.1.downsample.0"] == "Conv2d + BatchNorm2d"
        assert not report.kept
        assert not report.notes
        runs.clear()
        with torch.no_grad(), dispatch.observed():  # which wants each chain's own call
            model(x)
        assert sum(call["residual"] is not None for call in runs) == 2

    def test_a_residual_after_dropout(self):
        def forward(self, x):
            return torch.relu(self.drop(self.norm(self.conv(x))) + x)

        for drop in (nn.Dropout(0.3), nn.Dropout2d(0.3)):
            model = OfBlocks(forward, conv=conv(), norm=nn.BatchNorm2d(4), drop=drop)
            x = torch.randn(2, 4, 8, 8)
            report = check(model, x, chains=1)
            assert report.replaced[0].was == "Conv2d + BatchNorm2d + add + ReLU"
            model.drop.train()
            with torch.no_grad():
                assert not torch.equal(model(x), model(x))

    def test_functions(self, runs):
        report = check(Functional(), torch.randn(2, 3, 8, 8), chains=3)
        was = {row.name: row.was for row in report.replaced}
        assert was["first"] == "Conv2d + BatchNorm2d + ReLU + MaxPool2d"
        assert was["second"] == "Conv2d + add + Hardswish"
        assert was["third"] == "Conv2d + GELU"
        assert {call["activation"] for call in runs} == {"relu", "hardswish", "gelu_tanh"}

    @pytest.mark.parametrize(
        "activation",
        [
            nn.ReLU(),
            nn.ReLU6(inplace=True),
            nn.LeakyReLU(),
            nn.SiLU(),
            nn.GELU(),
            nn.GELU("tanh"),
            nn.Hardswish(),
            nn.Sigmoid(),
            nn.Tanh(),
        ],
        ids=str,
    )
    def test_sequential(self, activation, runs):
        model = nn.Sequential(
            conv(3, bias=False), nn.BatchNorm2d(4), nn.Identity(), activation, nn.MaxPool2d(2)
        )
        check(model, torch.randn(2, 3, 8, 8), chains=1)
        assert len(runs) == CALLS

    @pytest.mark.parametrize(
        "after",
        [
            nn.LeakyReLU(0.2),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.MaxPool2d(2, dilation=2),
            nn.BatchNorm2d(4, track_running_stats=False),
            nn.Softplus(),
        ],
        ids=str,
    )
    def test_what_no_chain_takes(self, after):
        check(nn.Sequential(conv(3), after), torch.randn(2, 3, 9, 9), chains=0)

    def test_pool_before_relu(self, runs):
        model = nn.Sequential(conv(3), nn.MaxPool2d(3, 2, 1), nn.ReLU(), nn.Tanh())
        check(model, torch.randn(1, 3, 8, 8), chains=1)
        assert runs[0]["activation"] == "relu"

    def test_nested_sequential_and_root(self):
        class Row(nn.Sequential):
            def __init__(self, channels):
                super().__init__(conv(channels, bias=False), nn.BatchNorm2d(4), nn.ReLU6())

        model = nn.Sequential(Row(3), nn.Sequential(Row(4), Row(4)), nn.Flatten())
        report = check(model, torch.randn(1, 3, 8, 8), chains=3)
        assert [row.name for row in report.replaced] == ["0.0", "1.0.0", "1.1.0"]
        assert len(model[:1]) == 1


def test_every_activation_is_found():
    assert set(FUNCTIONS) == set(ACTIVATIONS) - {None}
