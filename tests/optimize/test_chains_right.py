"""Chains are right wherever the model is called otherwise, or changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mbm_kernels
from tests.conftest import raises
from tests.optimize.models import (
    CALLS,
    Functional,
    OfBlocks,
    ResNet,
    check,
    conv,
    warmed,
)


class TestRight:
    """Where fusing all that follows would be wrong."""

    def test_output_used_elsewhere(self):
        def forward(self, x):
            y = self.conv(x)
            return F.relu(self.norm(y)) + y.mean()

        report = check(
            OfBlocks(forward, conv=conv(), norm=nn.BatchNorm2d(4)),
            torch.randn(1, 4, 8, 8),
            chains=0,
        )
        assert report.notes == [
            "conv: the chain ends before: what 'conv' returns is used elsewhere too"
        ]

    def test_called_twice(self, runs):
        def forward(self, x):
            for _ in range(2):
                x = self.relu(self.norm(self.conv(x)))
            return self.conv(x)

        model = OfBlocks(forward, conv=conv(), norm=nn.BatchNorm2d(4), relu=nn.ReLU())
        check(model, torch.randn(1, 4, 8, 8), chains=2)
        assert len(runs) == 2 * CALLS

    def test_residual_of_its_own_input(self):
        def forward(self, x):
            return F.relu(self.conv(x) + x)

        check(OfBlocks(forward, conv=conv()), torch.randn(1, 4, 8, 8), chains=1)

    @pytest.mark.parametrize("shape", [(1, 4, 1, 1), (8,), ()])
    def test_residual_that_broadcasts(self, shape):
        class Shifted(OfBlocks):
            def __init__(self):
                super().__init__(lambda self, x: F.relu(self.conv(x) + self.shift), conv=conv())
                self.shift = nn.Parameter(torch.randn(shape))

        check(Shifted(), torch.randn(2, 4, 8, 8), chains=1)

    def test_a_sum_that_writes_its_other_operand(self):
        def forward(self, x):
            y = self.first(x)
            y += self.second(x)
            return F.relu(y)

        def other(self, x):
            y = x.sin()
            y += self.first(x)
            return y * 2

        check(OfBlocks(forward, first=conv(), second=conv()), torch.randn(1, 4, 8, 8), chains=1)
        check(OfBlocks(other, first=conv()), torch.randn(1, 4, 8, 8), chains=0)

    def test_an_input_written_before_the_sum(self):
        def forward(self, x):
            x = x * 2
            y = self.conv(x)
            z = x.add_(1)
            return F.relu(y + z)

        report = check(OfBlocks(forward, conv=conv()), torch.randn(1, 4, 8, 8), chains=0)
        assert "may write its input" in report.notes[0]

    def test_an_input_written_before_the_activation(self):
        def forward(self, x):
            x = x * 2
            y = self.conv(x)
            x.add_(1)
            return F.relu(y) + x

        check(OfBlocks(forward, conv=conv()), torch.randn(1, 4, 8, 8), chains=1)

    @pytest.mark.parametrize("name", ["conv", "norm", "relu"])
    def test_hooks_in_a_chain(self, name):
        model = nn.Sequential()
        for key, module in {"conv": conv(3), "norm": nn.BatchNorm2d(4), "relu": nn.ReLU()}.items():
            model.add_module(key, module)
        seen = []
        getattr(model, name).register_forward_hook(lambda *args: seen.append(1))
        x = torch.randn(1, 3, 8, 8)
        report = check(model, x, chains=1 if name == "relu" else 0)
        assert f"a hook sits on '{name}'" in " ".join(report.notes)
        seen.clear()
        with torch.no_grad():
            model(x)
        assert seen == [1]

    def test_hooks_that_come_later(self, runs):
        model = warmed(nn.Sequential(conv(3), nn.ReLU()))
        x = torch.randn(1, 3, 8, 8)
        mbm_kernels.optimize(model)
        seen = []
        with torch.no_grad():
            expected = model(x)
            handle = model[0].register_forward_hook(lambda m, args, y: seen.append(y))
            assert torch.equal(model(x), F.relu(seen[0]))
            handle.remove()
            before = len(runs)
            torch.testing.assert_close(model(x), expected)
            assert len(runs) == before + 1

    def test_a_module_that_is_replaced_later(self):
        model = warmed(nn.Sequential(conv(3), nn.BatchNorm2d(4), nn.ReLU()))
        x = torch.randn(1, 3, 8, 8)
        mbm_kernels.optimize(model)
        with torch.no_grad():
            model(x)
            model[1] = nn.Identity()
            torch.testing.assert_close(model(x), F.relu(model[0](x)))

    def test_training_and_gradients(self, runs):
        model, x = ResNet(), torch.randn(2, 3, 16, 16)
        warmed(model)
        stock = copy.deepcopy(model)
        mbm_kernels.optimize(model)
        with torch.no_grad():
            model(x)
        runs.clear()
        for mode in (False, True):
            for m in (model, stock):
                m.train(mode)(x).sum().backward()
        assert not runs
        for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
        for ours, theirs in zip(model.buffers(), stock.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(x), stock.eval()(x), rtol=1e-3, atol=1e-3)
        assert runs

    @pytest.mark.parametrize("fused", [False, True])
    def test_weights_that_change(self, fused):
        model, x = nn.Sequential(conv(3), nn.BatchNorm2d(4), nn.ReLU()), torch.randn(2, 3, 8, 8)
        warmed(model)
        other = warmed(copy.deepcopy(model))
        mbm_kernels.optimize(model)

        def same():
            stock = copy.deepcopy(other)
            stock.load_state_dict(model.state_dict())
            stock[1].eps = model[1].eps
            with torch.no_grad():
                model(x)
                torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-5)

        same()
        model.load_state_dict(other.state_dict())
        same()
        with torch.no_grad():
            model[1].running_var.mul_(3)
        same()
        model[0].weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        same()
        model[1].eps = 0.5
        same()
        optimizer = torch.optim.Adam(model.parameters(), 0.1, fused=fused)
        model.train()(x).sum().backward()
        optimizer.step()
        model.eval()
        same()

    def test_other_arguments(self):
        model, x = warmed(Functional()), torch.randn(1, 3, 8, 8)
        stock = copy.deepcopy(model)
        mbm_kernels.optimize(model)
        with torch.no_grad():
            for args, kwargs in (((x,), {}), ((), {"x": x}), ((x, 2.0), {}), ((x,), {"scale": 3})):
                for key, value in stock(*args, **kwargs).items():
                    for _ in range(2):
                        found = model(*args, **kwargs)[key]
                    torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)

    def test_errors_are_torchs(self):
        model = nn.Sequential(conv(3), nn.ReLU()).eval()
        mbm_kernels.optimize(model)
        with torch.no_grad():
            model(torch.randn(1, 3, 8, 8))
            with raises(RuntimeError, "expected input.* to have 3 channels"):
                model(torch.randn(1, 5, 8, 8))
