"""Chains in inference: found, folded, right wherever the model is called otherwise, undone."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mbm_kernels
from mbm_kernels._core.op import OPS
from tests.conftest import raises
from tests.optimize.models import Functional, ResNet, assert_same_objects, state, warmed


@pytest.fixture
def runs(monkeypatch):
    """The options of each call of conv_bias_act by a chain."""
    from mbm_kernels.optimize import chain

    seen = []

    def watched(*args, **options):
        seen.append(options)
        return mbm_kernels.conv_bias_act(*args, **options)

    monkeypatch.setattr(chain, "conv_bias_act", watched)
    return seen


class OfBlocks(nn.Module):
    """A forward written in a test, of modules given by name."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.written = forward

    def forward(self, x):
        return self.written(self, x)


def conv(channels=4, **options):
    return nn.Conv2d(channels, 4, 3, padding=1, **options)


def check(model, *inputs, chains=None):
    """Optimizes, compares with the model before in float64, and returns the report."""
    warmed(model)
    truth = copy.deepcopy(model).double()
    doubled = [x.double() for x in inputs]
    with torch.no_grad():
        expected, stock = truth(*doubled), model(*inputs)
        report = mbm_kernels.optimize(model)
        fused = [row for row in report.replaced if row.now == "mbm_kernels.conv_bias_act"]
        assert chains is None or len(fused) == chains, str(report)
        for _ in range(2):  # the first call runs the model's own forward
            found = model(*inputs)
        for ours, exact, theirs in zip(*map(leaves, (found, expected, stock)), strict=True):
            limit = 2 * (theirs - exact).abs().max() + 1e-5 * exact.abs().max()
            assert (ours - exact).abs().max() <= limit
    return report


def leaves(value):
    return list(value.values()) if isinstance(value, dict) else [value]


class TestFound:
    def test_residual_network(self, runs):
        model = ResNet()
        report = check(model, torch.randn(2, 3, 32, 32), chains=6)
        was = {row.name: row.was for row in report.replaced}
        assert was["conv1"] == "Conv2d + BatchNorm2d + ReLU + MaxPool2d"
        assert was["layer1.1.conv2"] == "Conv2d + BatchNorm2d + add + ReLU"
        assert was["layer1.1.downsample.0"] == "Conv2d + BatchNorm2d"
        assert not report.kept
        assert not report.notes
        assert sum(call["residual"] is not None for call in runs) == 4

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
        assert len(runs) == 2

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
        assert len(runs) == 4

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
            y = torch.sin(x)
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

    @pytest.mark.parametrize("name", ["conv", "norm", "relu"])
    def test_hooks_in_a_chain(self, name):
        model = nn.Sequential()
        for key, module in {"conv": conv(3), "norm": nn.BatchNorm2d(4), "relu": nn.ReLU()}.items():
            model.add_module(key, module)
        seen = []
        getattr(model, name).register_forward_hook(lambda *args: seen.append(1))
        report = check(model, torch.randn(1, 3, 8, 8), chains=1 if name == "relu" else 0)
        assert f"a hook sits on '{name}'" in " ".join(report.notes)
        assert len(seen) == 3

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


class TestNotTraced:
    def test_sequential_within(self):
        def forward(self, x):
            if x.sum() > 1e9:
                return x
            return F.relu(self.conv(self.body(x)))

        model = OfBlocks(
            forward, conv=conv(), body=nn.Sequential(conv(3), nn.BatchNorm2d(4), nn.ReLU())
        )
        report = check(model, torch.randn(1, 3, 8, 8), chains=1)
        assert "(model): could not be traced" in report.notes[0]
        assert "TraceError" in report.notes[0]
        assert [row.name for row in report.replaced] == ["body.0", "conv"]

    def test_a_forward_that_sets_attributes(self):
        def forward(self, x):
            self.last = self.conv(x)
            return F.relu(self.last)

        model = OfBlocks(forward, conv=conv())
        report = check(model, torch.randn(1, 4, 8, 8), chains=0)
        assert "its forward sets attributes" in report.notes[0]

    @pytest.mark.parametrize("sampled", [False, True])
    def test_a_trace_that_is_wrong(self, sampled):
        def forward(self, x):
            y = F.relu(self.conv(x))
            return y + 1 if isinstance(y, torch.Tensor) else y

        model, x = warmed(OfBlocks(forward, conv=conv())), torch.randn(1, 4, 8, 8)
        with torch.no_grad():
            expected = model(x)
            found = []

            def run():
                found.append(mbm_kernels.optimize(model, sample_input=x if sampled else None))
                torch.testing.assert_close(model(x), expected)

            with pytest.warns(UserWarning, match="gives other results"):
                run()
            torch.testing.assert_close(model(x), expected)
        assert type(model) is OfBlocks or not sampled
        assert bool(found[0].notes) == sampled


class TestUndone:
    def test_objects(self, runs):
        model, x = warmed(ResNet()), torch.randn(1, 3, 16, 16)
        before = state(model)
        with torch.no_grad():
            expected = model(x)
            report = mbm_kernels.optimize(model, sample_input=x)
            assert isinstance(model, ResNet)
            report.revert()
            runs.clear()
            assert torch.equal(model(x), expected)
        assert not runs
        assert_same_objects(model, before)

    def test_copies_keep_their_chains(self, runs):
        model, x = warmed(ResNet()), torch.randn(1, 3, 16, 16)
        report = mbm_kernels.optimize(model)
        with torch.no_grad():
            expected = model(x)
            copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
            report.revert()
            for other in copies:
                runs.clear()
                for _ in range(2):
                    torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-5)
                assert len(runs) == 12
                other.layer1[0].conv1.weight.zero_()
            torch.testing.assert_close(model(x), expected)


class TestTools:
    def test_tracers_see_the_model_as_written(self):
        model, x = warmed(ResNet()), torch.randn(1, 3, 16, 16)
        with torch.no_grad():
            expected = model(x)
            mbm_kernels.optimize(model)
            model(x)
            graph = torch.fx.symbolic_trace(model)
            assert "bn1" in {node.target for node in graph.graph.nodes}
            torch.testing.assert_close(graph(x), expected, rtol=1e-4, atol=1e-5)
            traced = torch.jit.trace(model, x, check_trace=False)
            torch.testing.assert_close(traced(x), expected, rtol=1e-4, atol=1e-5)
            program = torch.export.export(model, (x,))
            torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-5)

    def test_vmap(self):
        model, x = warmed(nn.Sequential(conv(3), nn.ReLU())), torch.randn(2, 1, 3, 8, 8)
        mbm_kernels.optimize(model)
        with torch.no_grad():
            torch.testing.assert_close(torch.vmap(model)(x)[1], model(x[1]))


def test_every_activation_is_found():
    from mbm_kernels.ops.conv_bias_act.geometry import ACTIVATIONS
    from mbm_kernels.optimize.chain import ACTIVATIONS as FUNCTIONS

    assert set(FUNCTIONS) == set(ACTIVATIONS) - {None}
    assert "conv_bias_act" in OPS
