"""Linear layers behind convolutions: their values, what is seen of a change, what stays torch's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mbm_kernels._core import dispatch, native
from mbm_kernels.ops.concat_linear.problem import FEW_ROWS
from mbm_kernels.ops.conv_bias_act.activations import TABLE
from mbm_kernels.ops.conv_bias_act.geometry import ACTIVATIONS
from mbm_kernels.optimize.heads import Head
from mbm_kernels.optimize.runs import Alone
from tests.optimize.models import OfBlocks, optimized, sequences, warmed

MEMORY = (torch.contiguous_format, torch.channels_last)


def modules(self, x):
    return self.last(self.drop(self.act(self.fc(self.flat(self.pool(self.body(x)))))))


def functions(self, x):
    y = torch.flatten(F.adaptive_avg_pool2d(self.body(x), 1), 1)
    return self.last(F.dropout(F.hardswish(self.fc(y)), training=self.training))


def viewed(self, x):
    y = self.pool(self.body(x))
    return self.last(torch.tanh(self.fc(y.view(y.size(0), -1))))


def method(self, x):
    """What a sum is of, nothing tells."""
    y = self.fc(self.pool(self.body(x)).flatten(1))
    return self.last(self.act(y) + y)


FORMS = (modules, functions, viewed, method)


def classifier(forward=modules, channels=20, pool=1):
    return warmed(
        OfBlocks(
            forward,
            body=nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)),
            pool=nn.AdaptiveAvgPool2d(pool),
            flat=nn.Flatten(),
            fc=nn.Linear(channels * pool * pool, 37),
            act=nn.Hardswish(),
            drop=nn.Dropout(0.5),
            last=nn.Linear(37, 11, bias=forward is not functions),
        )
    )


def heads_of(model):
    return [step.what for s in sequences(model) for step in s.steps if isinstance(step.what, Head)]


def alone(model):
    """The linear layers that PyTorch runs."""
    ready = [r for s in sequences(model) for made in s._ready for r in made.runs]
    return [r.step.what for r in ready if isinstance(r, Alone) and isinstance(r.step.what, Head)]


@pytest.fixture
def by_cpu(monkeypatch):
    """The kernel runs wherever it can, whatever is predicted."""
    right = dispatch.select_among_others

    def select(op, backend, device, dtype, sizes):
        return "cpu" if op == "concat_linear" else right(op, backend, device, dtype, sizes)

    monkeypatch.setattr(dispatch, "select_among_others", select)


@pytest.mark.usefixtures("isa", "by_cpu")
class TestValues:
    @pytest.mark.parametrize("forward", FORMS)
    @pytest.mark.parametrize("memory", MEMORY)
    def test_of_a_model(self, forward, memory):
        model, x = classifier(forward), torch.randn(3, 3, 9, 8).contiguous(memory_format=memory)
        stock = copy.deepcopy(model)
        optimized(model, x)
        assert len(heads_of(model)) == (1 if forward is method else 2)
        assert not alone(model)
        with torch.no_grad():
            truth, theirs = copy.deepcopy(stock).double()(x.double()), stock(x)
            for _ in range(2):
                error = (model(x).double() - truth).abs().max()
                assert error <= 2 * (theirs - truth).abs().max() + 1e-7 * truth.abs().max()

    @pytest.mark.parametrize("memory", MEMORY)
    def test_a_map_of_several_pixels(self, memory):
        """Its rows are one after another in one layout only."""
        model = classifier(pool=2)
        x = torch.randn(3, 3, 8, 8).contiguous(memory_format=memory)
        stock = copy.deepcopy(model)
        optimized(model, x)
        assert len(heads_of(model)) == 2
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("batch", [0, 1, FEW_ROWS, FEW_ROWS + 1])
    def test_batches(self, batch):
        model, x = classifier(), torch.randn(batch, 3, 8, 8)
        stock = copy.deepcopy(model)
        optimized(model, x)
        assert len(alone(model)) == (2 if batch > FEW_ROWS else 0)
        with torch.no_grad():
            torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("activation", [name or "none" for name in ACTIVATIONS])
    @pytest.mark.parametrize("size", [(1, 1, 1), (5, 1100, 33), (70, 17, 64), (2, 3000, 5)])
    def test_kernel(self, size, activation):
        batch, features, outputs = size
        x, weight = torch.randn(batch, features), torch.randn(outputs, features)
        bias = torch.randn(outputs)
        form = TABLE[activation].fresh if activation in TABLE else lambda z: z
        place = ACTIVATIONS.index(activation if activation in TABLE else None)
        found = [torch.empty(batch, outputs) for _ in range(2)]
        for threads, y in zip((1, 3), found, strict=True):
            weights = (weight.data_ptr(), bias.data_ptr())
            native.cpu().linear_head((*size, place), x.data_ptr(), weights, y.data_ptr(), threads)
        assert torch.equal(*found)
        truth = form(F.linear(x.double(), weight.double(), bias.double()))
        theirs = form(F.linear(x, weight, bias))
        limit = 2 * (theirs - truth).abs().max() + 1e-6 * features**0.5
        assert (found[0] - truth).abs().max() <= limit


def write_through_data(model):
    model.fc.weight.data.numpy()[3] += 1


def other_storage(model):
    model.fc.weight.data = torch.randn(37, 20)


def other_strides(model):
    model.fc.weight.data = torch.randn(20, 37).t()


def strided_bias(model):
    model.fc.bias.data = torch.randn(74)[::2]


def other_parameter(model):
    model.last.weight = nn.Parameter(torch.randn(11, 37))


def without_bias(model):
    model.fc.bias = None


def replaced(model):
    model.fc = nn.Linear(20, 37)


def hooked(model):
    model.act.register_forward_hook(lambda _module, _args, y: y + 1)


CHANGES = (
    write_through_data,
    other_storage,
    other_strides,
    strided_bias,
    other_parameter,
    without_bias,
    replaced,
    hooked,
)


@pytest.mark.usefixtures("by_cpu")
class TestSeen:
    @pytest.mark.parametrize("freeze", [False, True])
    @pytest.mark.parametrize("change", CHANGES)
    def test_changes(self, change, freeze):
        model, x = classifier(), torch.randn(3, 3, 8, 8)
        stock = copy.deepcopy(model)
        optimized(model, x, freeze=freeze)
        torch.manual_seed(1)
        change(model)
        torch.manual_seed(1)
        change(stock)
        with torch.no_grad():
            for _ in range(3):
                torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-5)

    def test_a_dropout_in_training(self):
        model, x = classifier(), torch.randn(3, 3, 8, 8)
        optimized(model, x)
        model.drop.train()
        with torch.no_grad():
            assert not torch.equal(model(x), model(x))

    def test_a_storage_that_was_freed(self):
        model, x = classifier(), torch.randn(3, 3, 8, 8)
        optimized(model, x)
        model.fc.weight.untyped_storage().resize_(8)
        with torch.no_grad(), pytest.raises((ValueError, RuntimeError)):
            model(x)


def optimized_and_right(forward, channels, features):
    """A model of a convolution to so many channels and a linear layer of so many features."""
    body = nn.Sequential(nn.Conv2d(3, channels, 1), nn.ReLU())
    model, x = (
        OfBlocks(forward, body=body, fc=nn.Linear(features, 5)).eval(),
        torch.randn(2, 3, 4, 4),
    )
    with torch.no_grad():
        expected = model(x)
        optimized(model, x)
        torch.testing.assert_close(model(x), expected)
    return model


class TestLeft:
    def test_what_the_filter_keeps(self):
        for kept, heads in (("fc", 0), ("act", 1), ("flat", 2)):
            model = classifier()
            optimized(model, torch.randn(3, 3, 8, 8), filter_fn=lambda n, _, kept=kept: n != kept)
            assert len(heads_of(model)) == heads, kept

    def test_rows_of_sequences_of_words(self):
        """Of three dimensions as it may be, rows are many."""

        def forward(self, x):
            return self.fc(self.body(x).flatten(2).transpose(1, 2))

        assert not heads_of(optimized_and_right(forward, channels=8, features=8))

    def test_where_torch_is_faster(self, monkeypatch):
        monkeypatch.setattr(dispatch, "select_among_others", lambda *_: "torch")
        model, x = classifier(), torch.randn(3, 3, 8, 8)
        stock = copy.deepcopy(model)
        optimized(model, x)
        with torch.no_grad():
            assert torch.equal(model(x), model(x))
            torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-5)

    def test_a_map_written_before_it_is_read(self):
        def forward(self, x):
            y = self.body(x)
            flat = y.flatten(1)
            y += 1
            return self.fc(flat)

        optimized_and_right(forward, channels=4, features=64)


def test_refused():
    call = native.cpu().ConvSequence(3)
    places = [(0, 0), (1, 0), (-1, 0), (2, 0)]
    with pytest.raises(ValueError, match="got a size of a linear layer = -1"):
        call.add_head((1, -1, 1, 0), places)
    with pytest.raises(ValueError, match="got activation = 99"):
        call.add_head((1, 1, 1, 99), places)
    with pytest.raises(ValueError, match="sequence: got a map at base 3"):
        call.add_head((1, 1, 1, 0), [*places[:3], (3, 0)])
    call.add_head((1, 1, 1, 0), places)
    with pytest.raises(ValueError, match="weight: got a null address"):
        call.run([64, 0, 64], 1)
