"""Squeeze-and-excitation among chains: its values, and when it stays as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mbm_kernels
from mbm_kernels._core import cost, dispatch, native
from mbm_kernels.optimize.gating import Scale, Squeeze
from tests.optimize.models import OfBlocks, optimized, sequences, warmed


def pooled(self, x):
    scale = self.hard(self.fc2(self.act(self.fc1(self.pool(x)))))
    return scale * x


def averaged(self, x):
    squeezed = x.mean((2, 3), keepdim=True)
    return x * torch.sigmoid(self.fc2(self.act(self.fc1(squeezed))))


def functional(self, x):
    squeezed = F.relu(self.fc1(F.adaptive_avg_pool2d(x, (1, 1))))
    return torch.mul(x, F.hardsigmoid(self.fc2(squeezed)))


def kept(self, x):
    """The map that is scaled is read once more."""
    return pooled(self, x) + self.fc3(x)


FORMS = (pooled, averaged, functional, kept)


class Gated(nn.Module):
    """A convolution, squeeze-and-excitation, and another convolution."""

    def __init__(self, forward=pooled, channels=20, small=6):
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.Hardswish()
        )
        self.gate = OfBlocks(
            forward,
            pool=nn.AdaptiveAvgPool2d(1),
            fc1=nn.Conv2d(channels, small, 1),
            act=nn.ReLU(),
            fc2=nn.Conv2d(small, channels, 1),
            hard=nn.Hardsigmoid(),
            fc3=nn.Conv2d(channels, channels, 1),
        )
        self.last = nn.Sequential(nn.Conv2d(channels, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d((1, 1))

    def forward(self, x):
        return torch.flatten(self.pool(self.last(self.gate(self.first(x)))), 1)


def steps_of(model):
    return [type(step.what) for s in sequences(model) for step in s.steps]


def assert_within_twice_torch(found, stock, truth):
    limit = 2 * (stock.double() - truth).abs().max() + 1e-7 * truth.abs().max()
    assert (found.double() - truth).abs().max() <= limit


@pytest.mark.usefixtures("isa")
class TestValues:
    @pytest.mark.parametrize("forward", FORMS)
    @pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
    def test_of_a_model(self, calls, forward, memory):
        model = warmed(Gated(forward))
        x = torch.randn(2, 3, 13, 11).contiguous(memory_format=memory)
        with torch.no_grad():
            stock, truth = model(x), copy.deepcopy(model).double()(x.double())
            optimized(model, x)
            calls()
            found = model(x)
        assert calls() == 1
        assert steps_of(model).count(Scale) == 1
        assert steps_of(model).count(Squeeze) == 2
        (sequence,) = sequences(model)
        native_calls = [run for run in sequence._ready[0].runs if hasattr(run, "held")]
        assert [len(run.held) for run in native_calls] == [len(sequence.steps)]
        assert_within_twice_torch(found, stock, truth)

    @pytest.mark.parametrize("batch", [0, 1, 5])
    def test_of_other_batches(self, calls, batch):
        model = warmed(Gated())
        stock = copy.deepcopy(model)
        optimized(model, torch.randn(2, 3, 9, 9))
        x = torch.randn(batch, 3, 9, 9)
        with torch.no_grad():
            for _ in range(3):
                torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-5)
            calls()
            model(x)
        assert calls() == 1

    def test_what_others_read_stays(self, calls):
        def forward(self, x):
            y = self.a(x).relu()
            s = self.c(y.mean((2, 3), keepdim=True)).sigmoid()
            return {"y": y, "z": self.b(s * y).relu(), "s": s}

        layers = {name: nn.Conv2d(5, 5, 1) for name in "abc"}
        model, x = OfBlocks(forward, **layers).eval(), torch.randn(2, 5, 8, 7)
        with torch.no_grad():
            expected = model(x)
            optimized(model, x)
            calls()
            found = model(x)
        assert calls() == 1
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("last", [False, True])
class TestKernels:
    """csrc's plane_means and scale_planes by themselves."""

    SIZES = [(1, 1, 1), (2, 3, 49), (3, 17, 5), (1, 70, 33), (2, 16, 256), (1, 5, 9001)]

    @pytest.mark.parametrize("size", SIZES)
    def test_means(self, size, last):
        batch, channels, pixels = size
        x = torch.randn(batch, pixels, channels) if last else torch.randn(batch, channels, pixels)
        x += 3
        truth = x.double().mean(1 if last else 2)
        found = [torch.empty(batch, channels) for _ in range(2)]
        for threads, y in zip((1, 3), found, strict=True):
            native.cpu().plane_means((*size, last), x.data_ptr(), y.data_ptr(), threads)
        assert torch.equal(*found)
        assert ((found[0].double() - truth).abs() <= 3e-7 * x.abs().max()).all()

    @pytest.mark.parametrize("hard", [False, True])
    @pytest.mark.parametrize("size", SIZES)
    def test_scales(self, size, last, hard):
        batch, channels, pixels = size
        x = torch.randn(batch, pixels, channels) if last else torch.randn(batch, channels, pixels)
        factors = 4 * torch.randn(batch, channels)
        factors[0, 0] = float("nan")
        given = F.hardsigmoid(factors) if hard else factors
        expected = x * given.unsqueeze(1 if last else 2)
        for threads, in_place in ((1, False), (3, False), (1, True)):
            y = x.clone() if in_place else torch.empty_like(x)
            addresses = (y if in_place else x).data_ptr(), factors.data_ptr(), y.data_ptr()
            native.cpu().scale_planes((*size, last), hard, *addresses, threads)
            torch.testing.assert_close(y, expected, rtol=3e-7, atol=0, equal_nan=True)


class TestRefused:
    def test_sizes_and_places(self):
        call = native.cpu().ConvSequence(2)
        with pytest.raises(ValueError, match="sizes: got a map of 1 x 0 planes of 4 pixels"):
            call.add_means((1, 0, 4, False), [(0, 0), (1, 0)])
        with pytest.raises(ValueError, match="sequence: got a map at base 2; expected one of 2"):
            call.add_means((1, 1, 4, False), [(0, 0), (2, 0)])
        with pytest.raises(ValueError, match="sequence: got a map at base -1"):
            call.add_scale((1, 1, 4, False), False, [(0, 0), (-1, 0), (1, 0)])
        call.add_means((1, 1, 4, False), [(0, 0), (1, 0)])
        with pytest.raises(ValueError, match="sequence: got 1 addresses; expected 2"):
            call.run([0], 1)
        with pytest.raises(ValueError, match="x: got a null address"):
            call.run([0, 0], 1)

    def test_a_mean_of_three_dimensions(self):
        def forward(self, x):
            return self.a(x).relu().flatten(2).unsqueeze(1)[0].mean((-2, -1), keepdim=True)

        model, x = OfBlocks(forward, a=nn.Conv2d(3, 4, 1)).eval(), torch.randn(1, 3, 5, 5)
        with torch.no_grad():
            expected = model(x)
            optimized(model, x)
            torch.testing.assert_close(model(x), expected)

    def test_other_products(self):
        """Of whole maps, by a parameter, by a number, and of three means."""

        def forward(self, x):
            y = self.a(x).relu() * self.scale
            y = y * self.b(y).sigmoid() * 2
            return y * y.mean(1, keepdim=True) * y.mean() * y.mean((2, 3), keepdim=True)

        model = OfBlocks(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 1)).eval()
        model.scale = nn.Parameter(torch.randn(4, 1, 1))
        x = torch.randn(2, 3, 5, 5)
        with torch.no_grad():
            expected = model(x)
            optimized(model, x)
            torch.testing.assert_close(model(x), expected)
        assert steps_of(model).count(Scale) <= 1

    def test_a_factor_that_is_written_before_its_product(self):
        def forward(self, x):
            y = self.a(x).relu()
            s = self.b(y.mean((2, 3), keepdim=True))
            gate = F.hardsigmoid(s)
            s.add_(1)
            return gate * y + s

        model = OfBlocks(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 1)).eval()
        x = torch.randn(2, 3, 5, 5)
        with torch.no_grad():
            expected = model(x)
            optimized(model, x)
            torch.testing.assert_close(model(x), expected)

    def test_what_the_filter_keeps(self):
        model = warmed(Gated())
        x = torch.randn(2, 3, 9, 9)
        kept = ("gate.pool", "gate.hard")
        optimized(model, x, filter_fn=lambda name, _module: name not in kept)
        assert steps_of(model).count(Scale) == 0
        assert steps_of(model).count(Squeeze) == 1


class TestUndone:
    @pytest.mark.parametrize("name", ["pool", "hard"])
    def test_a_hook_is_called(self, name):
        model = warmed(Gated())
        x = torch.randn(2, 3, 9, 9)
        with torch.no_grad():
            expected = model(x)
            optimized(model, x)
            seen = []
            getattr(model.gate, name).register_forward_hook(lambda *args: seen.append(1))
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        assert seen == [1]

    def test_another_module_is_called(self):
        model = warmed(Gated())
        stock, x = copy.deepcopy(model), torch.randn(2, 3, 9, 9)
        optimized(model, x)
        with torch.no_grad():
            for form in (model, stock):
                form.gate.hard = nn.Sigmoid()
            for _ in range(3):
                torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-5)


class TestChoice:
    """A chain among others needs no call of its own."""

    def put(self, monkeypatch, predicted):
        monkeypatch.setattr(cost.Table, "predict", lambda *_: predicted)
        monkeypatch.setattr(dispatch, "_defaults", {})
        dispatch.reload()  # the constants may be of another ISA

    @pytest.mark.parametrize(
        ("predicted", "taken"),
        [
            (cost.Predicted(100.0, 90.0, 1.5, 0.0), True),
            (cost.Predicted(100.0, 70.0, 1.5, 0.0), False),
            (cost.Predicted(100.0, 50.0, 1.5, 40.0), True),
        ],
    )
    @pytest.mark.skipif(native.isa() not in cost.LANES, reason="no constants for this CPU")
    def test_by_prediction(self, monkeypatch, calls, predicted, taken):
        self.put(monkeypatch, predicted)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()).eval()
        x = torch.randn(1, 3, 9, 9)
        with torch.no_grad():
            expected = model(x)
            report = mbm_kernels.optimize(model, sample_input=x)
            found = [model(x) for _ in range(4)]
        chains = [row.name for row in report.replaced if "+" in row.was]
        assert chains == (["0", "2"] if taken else [])
        assert (calls() > 0) is taken
        for y in found:
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(found[1], found[3])
        monkeypatch.undo()
        dispatch.reload()

    def test_where_pytorch_runs_all(self, calls):
        model, x = warmed(Gated()), torch.randn(2, 3, 9, 9)
        with torch.no_grad():
            expected = model(x)
            optimized(model, x)
            for chain in sequences(model)[0].chains:
                chain.backend = "torch"
            found = [model(x) for _ in range(4)]
        runs = sequences(model)[0]._ready[0].runs
        assert {type(run).__name__ for run in runs} <= {"Alone", "Turn"}
        for y in found:
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)

    def test_one_that_pytorch_runs_parts_the_others(self):
        model = warmed(
            nn.Sequential(
                *(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()) for _ in "abc")
            )
        )
        x = torch.randn(1, 8, 15, 15)
        with torch.no_grad():
            expected = model(x)
            report = optimized(model, x)
            for chain in sequences(model)[0].chains[1:2]:
                chain.backend = "torch"
            found = [model(x) for _ in range(4)]
        (sequence,) = sequences(model)
        kinds = [type(run).__name__ for run in sequence._ready[0].runs]
        assert [kind for kind in kinds if kind != "Turn"] == ["Call", "Alone", "Call"]
        assert len(report.replaced) == 3
        for y in found:
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
