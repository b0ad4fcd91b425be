"""Forwards that stay as written; undoing, copies, tools."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mbm_kernels
from tests.optimize.models import (
    OfBlocks,
    ResNet,
    assert_same_objects,
    check,
    conv,
    optimized,
    state,
    warmed,
)


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

    @pytest.mark.parametrize("name", ["conv1.weight", "bn1.running_mean"])
    def test_a_write_that_torch_does_not_count(self, name):
        model, x = warmed(ResNet()), torch.randn(1, 3, 16, 16)
        with torch.no_grad(), mbm_kernels.optimized(model):
            for _ in range(2):
                before = model(x)
            tensor = dict([*model.named_parameters(), *model.named_buffers()])[name]
            tensor.data.view(-1)[-1:].numpy()[0] += 3.0
            found = model(x)
        with torch.no_grad():
            torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-4)
        assert not torch.equal(found, before)

    @pytest.mark.parametrize(
        ("place", "name", "value"),
        [
            (0, "stride", (2, 2)),
            (1, "eps", 1.0),
            (2, "negative_slope", 0.5),
            (3, "kernel_size", 3),
            (4, "approximate", "none"),
        ],
    )
    def test_another_setting_of_a_module(self, place, name, value):
        layers = (conv(3), nn.BatchNorm2d(4), nn.LeakyReLU(), nn.MaxPool2d(2), nn.GELU("tanh"))
        model = warmed(nn.Sequential(*layers[:4], nn.Sequential(conv(), layers[4])))
        stock, x = copy.deepcopy(model), torch.randn(2, 3, 16, 16)
        optimized(model, x)
        for changed in (model, stock):
            owner = changed[place] if place < 4 else changed[4][1]
            setattr(owner, name, value)
        with torch.no_grad():
            for _ in range(3):
                torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-5)


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

    def test_compile(self):
        model, x = warmed(nn.Sequential(conv(3), nn.ReLU())), torch.randn(2, 3, 8, 8)
        mbm_kernels.optimize(model)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))

    def test_inference_mode(self, runs):
        model, x = warmed(ResNet()), torch.randn(2, 3, 16, 16)
        with torch.inference_mode():
            expected = model(x)
            mbm_kernels.optimize(model)
            for _ in range(2):
                torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        assert runs
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)

    def test_vmap(self):
        model, x = warmed(nn.Sequential(conv(3), nn.ReLU())), torch.randn(2, 1, 3, 8, 8)
        mbm_kernels.optimize(model)
        with torch.no_grad():
            torch.testing.assert_close(torch.vmap(model)(x)[1], model(x[1]))
