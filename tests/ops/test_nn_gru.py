"""nn.GRU against torch.nn.GRU: every flag, every kind of input, the same errors."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import mbm_kernels
from mbm_kernels import nn
from mbm_kernels._core import dispatch
from mbm_kernels.testing.suite import available_backends, interpreted
from tests.conftest import raises

C, H, T, B = 5, 6, 4, 3
FLAGS = [
    dict(zip(("num_layers", "bias", "batch_first", "bidirectional"), values, strict=True))
    for values in itertools.product((1, 2), (True, False), (True, False), (True, False))
]


# test_gru.py tests the operation that a module calls with every backend. Triton's interpreter takes
# a quarter of a minute for a module of two layers, so that it runs two kinds of module alone.
COMPILED = [backend for backend in available_backends("gru") if not interpreted(backend)]
DROPPED_IN = [(backend, flags) for backend in COMPILED for flags in FLAGS]
if interpreted("triton"):
    # One layer, with everything and with nothing.
    DROPPED_IN += [("triton", flags) for flags in (FLAGS[0], FLAGS[7])]


@pytest.fixture(params=COMPILED)
def backend(request):
    return request.param


def pair(backend, **flags):
    """A stock layer and ours, with its weights."""
    stock = torch.nn.GRU(C, H, **flags)
    ours = nn.GRU(C, H, **flags, backend=backend)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def flat(outputs):
    found = []
    for output in outputs:
        found += [output.data] if isinstance(output, PackedSequence) else [output]
    return found


def assert_same(ours, stock, *args):
    """Equal outputs, in layout too, and equal gradients of inputs and parameters."""
    actual, expected = ours(*args), stock(*args)
    assert type(actual[0]) is type(expected[0])
    for a, e in zip(flat(actual), flat(expected), strict=True):
        torch.testing.assert_close(a, e)
        assert a.stride() == e.stride()
    if isinstance(expected[0], PackedSequence):
        for a, e in zip(actual[0][1:], expected[0][1:], strict=True):
            assert (a is None) == (e is None)
            assert a is None or torch.equal(a, e)
    grads = []
    for module, outputs in ((ours, actual), (stock, expected)):
        leaves = [a.data if isinstance(a, PackedSequence) else a for a in args if a is not None]
        leaves = [leaf for leaf in leaves if leaf.requires_grad] + list(module.parameters())
        grads.append(torch.autograd.grad(sum(o.sin().sum() for o in flat(outputs)), leaves))
    for a, e in zip(*grads, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize(
    ("name", "flags"),
    DROPPED_IN,
    ids=[f"{name}-{'-'.join(map(str, flags.values()))}" for name, flags in DROPPED_IN],
)
def test_module_is_drop_in(name, flags):
    stock, ours = pair(name, **flags)
    assert isinstance(ours, torch.nn.GRU)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in stock.named_parameters()]
    copied = torch.nn.GRU(C, H, **flags)
    copied.load_state_dict(ours.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(copied.parameters(), stock.parameters(), strict=True)
    )
    states = (2 if flags["bidirectional"] else 1) * flags["num_layers"]
    x = torch.randn(B, T, C) if flags["batch_first"] else torch.randn(T, B, C)
    x.requires_grad_()
    for h0 in (None, torch.randn(states, B, H, requires_grad=True)):
        assert_same(ours, stock, x, h0)
    sample = torch.randn(T, C, requires_grad=True)
    for h0 in (None, torch.randn(states, H, requires_grad=True)):
        assert_same(ours, stock, sample, h0)
    lengths = torch.tensor([2, 4, 1])
    for enforce_sorted in (True, False):
        given = lengths.sort(descending=True)[0] if enforce_sorted else lengths
        packed = pack_padded_sequence(x, given, flags["batch_first"], enforce_sorted=enforce_sorted)
        packed = packed._replace(data=packed.data.detach().requires_grad_())
        for h0 in (None, torch.randn(states, B, H, requires_grad=True)):
            assert_same(ours, stock, packed, h0)


def test_packed_rows_of_one_length_need_no_padding(backend):
    stock, ours = pair(backend, num_layers=2, bidirectional=True)
    assert_same(ours, stock, pack_sequence([torch.randn(T, C) for _ in range(B)]))


def test_batch_of_zero_and_one(backend):
    stock, ours = pair(backend, bidirectional=True)
    assert_same(ours, stock, torch.randn(T, 0, C), None)
    assert_same(ours, stock, torch.randn(1, 1, C), None)


def test_call_without_gradients(backend):
    stock, ours = pair(backend, num_layers=2)
    x = torch.randn(T, B, C)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), stock(x))
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), stock(x))
    for module in (ours, stock):
        module.requires_grad_(False)
    torch.testing.assert_close(ours(x), stock(x))
    assert not ours(x)[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    stock, ours = pair("auto", num_layers=2, bidirectional=True)
    x = torch.randn(T, B, C, dtype=dtype)
    y, h_n = ours.to(dtype)(x)
    torch.testing.assert_close((y, h_n), stock.to(dtype)(x))
    assert y.dtype == h_n.dtype == dtype


def test_autocast(backend):
    """The dtypes are those of stock, which autocast does not lower on a CPU."""
    stock, ours = pair(backend, num_layers=2)
    x = torch.randn(T, B, C)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = stock(x), ours(x)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0.02)
        assert torch.equal(ours(x.bfloat16())[0], ours(x.bfloat16().float())[0])
    assert actual[0].dtype == actual[1].dtype == torch.float32


def test_dropout_between_layers(backend):
    size, p = 64, 0.25
    ours = nn.GRU(size, size, num_layers=2, bias=False, dropout=p, backend=backend)
    x = torch.randn(2, 20, size)
    torch.manual_seed(3)
    first = ours(x)[0]
    torch.manual_seed(3)
    assert torch.equal(ours(x)[0], first)
    assert not torch.equal(ours(x)[0], first)
    ours.eval()
    still = ours(x)[0]
    assert torch.equal(ours(x)[0], still)
    # The second layer made to pass its input on: z = 0, n = tanh(input), a zero where dropped.
    ours.train()
    with torch.no_grad():
        ours.weight_hh_l1.zero_()
        ours.weight_ih_l1.zero_()
        ours.weight_ih_l1[2 * size :] = torch.eye(size)
    kept = ours(x)[0][0]
    ours.eval()
    full = ours(x)[0][0]
    dropped = kept == 0
    share = dropped.double().mean().item()
    deviation = (p * (1 - p) / dropped.numel()) ** 0.5
    assert abs(share - p) < 4 * deviation
    # z = sigmoid(0) = 1/2 halves tanh(input), whose argument grows by 1 / (1 - p) where kept.
    expected = torch.tanh(torch.atanh(2 * full) / (1 - p)) / 2
    torch.testing.assert_close(kept[~dropped], expected[~dropped])


def test_dropout_leaves_a_single_layer_alone(backend):
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        ours = nn.GRU(C, H, dropout=0.5, backend=backend)
    x = torch.randn(T, B, C)
    assert torch.equal(ours(x)[0], ours(x)[0])


@pytest.mark.parametrize(
    "flags", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}]
)
def test_compile(backend, flags):
    torch._dynamo.reset()
    stock, ours = pair(backend, **flags)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = ours
            self.head = torch.nn.Linear(H * (2 if flags else 1), 2)

        def forward(self, x):
            return self.head(self.gru(x)[0].relu())

    model, x = Model(), torch.randn(B, T, C)
    expected = model(x)
    expected_grads = torch.autograd.grad(expected.sin().sum(), list(model.parameters()))
    actual = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(actual, expected)
    grads = torch.autograd.grad(actual.sin().sum(), list(model.parameters()))
    torch.testing.assert_close(grads, expected_grads)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), stock(x))


def test_compile_of_a_subclass_and_not_of_stock(backend):
    class Mine(nn.GRU):
        pass

    torch._dynamo.reset()
    mine, x = Mine(C, H, backend=backend), torch.randn(T, B, C)
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), mine(x))
    assert torch._dynamo.config.allow_rnn is False
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN"):
        torch.compile(torch.nn.GRU(C, H), fullgraph=True, backend="aot_eager")(x)


def test_compile_of_packed_sequences(backend):
    torch._dynamo.reset()
    _, ours = pair(backend, num_layers=2, bidirectional=True)
    compiled = torch.compile(ours, backend="aot_eager")  # breaks the graph for the batch's size
    for lengths in ([2, 4, 1], [3, 3, 3]):
        packed = pack_sequence([torch.randn(n, C) for n in lengths], enforce_sorted=False)
        assert_same(compiled, ours, packed)


@pytest.mark.filterwarnings("error:The tensor attribute")
def test_export(backend):
    _, ours = pair(backend, num_layers=2)
    x = torch.randn(T, B, C)
    program = torch.export.export(ours, (x,))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("mbm_kernels.gru.default") == 2
    torch.testing.assert_close(program.module()(x), ours(x))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functional_call_uses_the_given_weights(backend):
    stock, ours = pair(backend, num_layers=2)
    x = torch.randn(T, B, C)
    other = {n: p.detach() * 0.5 for n, p in ours.named_parameters()}
    actual = torch.func.functional_call(ours, other, (x,))
    stock.load_state_dict(other)
    torch.testing.assert_close(actual, stock(x))

    def loss(weights, x):
        return torch.func.functional_call(ours, weights, (x,))[0].sin().sum()

    xs = torch.randn(2, T, B, C)
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(other, xs)
    for name, grad in torch.func.grad(loss)(other, xs[1]).items():
        torch.testing.assert_close(per_sample[name][1], grad)


def test_backward_twice(backend):
    stock, ours = pair(backend, num_layers=2)
    x = torch.randn(T, B, C, requires_grad=True)

    def penalty(module):
        (grad,) = torch.autograd.grad(module(x)[0].sin().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [x, *module.parameters()])

    actual = penalty(ours)
    assert all((grad != 0).any() for grad in actual)
    torch.testing.assert_close(actual, penalty(stock))


def test_copies_keep_the_backend(backend):
    _, ours = pair(backend, num_layers=2)
    x = torch.randn(T, B, C)
    expected = ours(x)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    copies = (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(buffer, weights_only=False),
    )
    for other in copies:
        assert type(other) is nn.GRU
        assert other.backend == backend
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    with torch.no_grad():
        copies[0].weight_hh_l0.zero_()
    assert not torch.equal(copies[0](x)[0], expected[0])
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=0)


def test_repr_shows_a_backend_that_was_chosen():
    assert repr(nn.GRU(C, H, num_layers=2)) == repr(torch.nn.GRU(C, H, num_layers=2))
    assert repr(nn.GRU(C, H, backend="cpu")) == "GRU(5, 6, backend='cpu')"


def test_constructor_is_torchs():
    ours = nn.GRU(C, H, 2, False, True, 0.5, True, dtype=torch.float64, backend="torch")
    stock = torch.nn.GRU(C, H, 2, False, True, 0.5, True, dtype=torch.float64)
    assert {n: (p.shape, p.dtype) for n, p in ours.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in stock.named_parameters()
    }
    assert nn.GRU(C, H, device="meta").weight_ih_l0.device.type == "meta"
    with raises(ValueError, "nn.GRU: backend: got 'fast'; expected one of auto, cpu"):
        nn.GRU(C, H, backend="fast")
    for bad in ({"proj_size": 2}, {"num_layers": 0}, {"dropout": 2.0}, {"bias": "no"}):
        with pytest.raises((ValueError, TypeError)) as expected:
            torch.nn.GRU(C, H, **bad)
        with pytest.raises(expected.type) as actual:
            nn.GRU(C, H, **bad)
        assert str(actual.value) == str(expected.value)


def test_backend_errors(backend):
    missing = next(n for n, reason in mbm_kernels.backends("gru").items() if reason is not None)
    ours = nn.GRU(C, H, backend=missing)
    with raises(mbm_kernels.BackendUnavailableError, f"gru: backend '{missing}' cannot run"):
        ours(torch.randn(T, B, C))
    with mbm_kernels.disabled():
        assert ours(torch.randn(T, B, C))[0].shape == (T, B, H)


@pytest.mark.parametrize("batch_first", [False, True])
def test_bad_input_raises_as_torch_does(backend, batch_first):
    stock, ours = pair(backend, num_layers=2, batch_first=batch_first)
    x = torch.randn(B, T, C) if batch_first else torch.randn(T, B, C)
    packed = pack_padded_sequence(x, torch.tensor([3, 2, 1]), batch_first)
    empty = x[:, :0] if batch_first else x[:0]
    for args in (
        (torch.randn(C),),
        (torch.randn(1, T, B, C),),
        (torch.randn(T, B, C + 1),),
        (torch.randn(T, C + 1),),
        (empty,),
        (x.double(),),
        (x, torch.randn(1, B, H)),
        (x, torch.randn(2, B + 1, H)),
        (x, torch.randn(2, B, H + 1)),
        (x, torch.randn(2, H)),
        (torch.randn(T, C), torch.randn(2, 1, H)),
        (packed._replace(data=torch.randn(6, C + 1)),),
        (packed, torch.randn(2, B + 1, H)),
        (packed, torch.randn(1, B, H)),
    ):
        with pytest.raises((ValueError, RuntimeError)) as expected:
            stock(*args)
        with pytest.raises(expected.type) as actual:
            ours(*args)
        assert str(actual.value) == str(expected.value)


def test_stock_call_where_all_layers_run_torch(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.nn.GRU, "forward", lambda *args: calls.append(args) or "stock")
    x = torch.randn(T, B, C)
    assert nn.GRU(C, H, num_layers=2, backend="torch")(x) == "stock"
    with mbm_kernels.disabled():
        assert nn.GRU(C, H)(x) == "stock"
    assert len(calls) == 2


@pytest.mark.skipif(mbm_kernels.backends("gru")["cpu"] is not None, reason="no CPU kernels")
def test_each_layer_follows_its_own_prediction(monkeypatch, predictions):
    predictions(lambda op, sizes: sizes["C"] == H)
    kernel = dispatch.load_backend("gru", "cpu")
    seen = []
    original = kernel.fwd
    monkeypatch.setattr(kernel, "fwd", lambda *a: seen.append(a[1].size(2)) or original(*a))
    stock, ours = pair("auto", num_layers=3)
    x = torch.randn(T, B, C)
    torch.testing.assert_close(ours(x), stock(x))
    assert seen == [H, H]
    single, stock = nn.GRU(C, H), torch.nn.GRU(C, H)
    single.load_state_dict(stock.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(single(x), stock(x), strict=True))
    assert seen == [H, H]


def test_packed_sequences_under_another_default_device(backend):
    stock, ours = pair(backend, num_layers=2)
    packed = pack_sequence([torch.randn(n, C) for n in (2, 4, 1)], enforce_sorted=False)
    with torch.device("meta"):
        assert_same(ours, stock, packed)
