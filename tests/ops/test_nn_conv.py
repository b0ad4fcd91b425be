"""nn.Conv2d and nn.ConvBiasAct against torch.nn.Conv2d."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from mbm_kernels import nn
from mbm_kernels._core import dispatch, native, packing
from mbm_kernels.ops.conv_bias_act import problem
from tests.conftest import raises

needs_cpu = pytest.mark.skipif(native.cpu_reason() is not None, reason="needs _C_cpu")

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
CONFIGURATIONS = {
    "plain": ((3, 4, 3), {}),
    "positional": ((3, 4, 3, 2, 1, 1, 1, False), {}),
    "oblong": ((3, 4, (3, 2)), {"stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)}),
    "grouped": ((4, 6, 3), {"groups": 2, "padding": 1}),
    "depthwise": ((4, 4, 3), {"groups": 4, "padding": "same"}),
    "same, even kernel": ((3, 4, 4), {"padding": "same"}),
    "valid": ((3, 4, 3), {"padding": "valid", "bias": False}),
    "double": ((3, 4, 3), {"dtype": torch.float64}),
    "reflect": ((3, 4, 3), {"padding": (1, 2), "padding_mode": "reflect"}),
    "replicate": ((3, 4, 3), {"padding": 2, "stride": 2, "padding_mode": "replicate"}),
    "circular, same": ((3, 4, 4), {"padding": "same", "padding_mode": "circular"}),
}


def twins(args, options, **epilogue):
    stock = torch.nn.Conv2d(*args, **options)
    kind = nn.ConvBiasAct if epilogue else nn.Conv2d
    ours = kind(*args, **options, **epilogue)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def image(stock, *leading):
    channels, dtype = stock.in_channels, stock.weight.dtype
    return torch.randn(*leading, channels, 9, 8, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("leading", [(2,), ()], ids=["batched", "unbatched"])
def test_conv2d_is_torchs(name, leading):
    stock, ours = twins(*CONFIGURATIONS[name])
    assert isinstance(ours, torch.nn.Conv2d)
    x = image(stock, *leading)
    expected, actual = stock(x), ours(x)
    assert actual.stride() == expected.stride()
    grad = torch.randn_like(expected)
    names = [n for n, _ in stock.named_parameters()]
    wanted = torch.autograd.grad(expected, (x, *stock.parameters()), grad)
    found = torch.autograd.grad(actual, (x, *ours.parameters()), grad)
    torch.testing.assert_close(actual, expected)
    for parameter, a, e in zip(["x", *names], found, wanted, strict=True):
        torch.testing.assert_close(a, e, msg=lambda m, p=parameter: f"{p}: {m}")


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_conv_bias_act_adds_its_epilogue(name):
    pool = (3, 2, 1)
    stock, ours = twins(*CONFIGURATIONS[name], activation="silu", max_pool=pool)
    x = image(stock, 2).detach()
    z = stock(x)
    residual = torch.randn_like(z)
    torch.testing.assert_close(ours(x, residual), F.max_pool2d(F.silu(z + residual), *pool))
    torch.testing.assert_close(ours(x), F.max_pool2d(F.silu(z), *pool))
    stock.load_state_dict(ours.state_dict())


def test_same_seed_same_parameters():
    torch.manual_seed(3)
    stock = torch.nn.Conv2d(3, 4, 3)
    for kind in (nn.Conv2d, nn.ConvBiasAct):
        torch.manual_seed(3)
        ours = kind(3, 4, 3)
        assert ours.state_dict().keys() == stock.state_dict().keys()
        assert all(torch.equal(v, stock.state_dict()[n]) for n, v in ours.state_dict().items())


def test_channels_last_module():
    stock, ours = twins((3, 4, 3), {"padding": 1})
    x = torch.randn(2, 3, 6, 6)
    for module in (stock, ours):
        module.to(memory_format=torch.channels_last)
    assert ours(x).stride() == stock(x).stride()
    assert ours(x).is_contiguous(memory_format=torch.channels_last)


def test_copies_keep_everything():
    module = nn.ConvBiasAct(3, 4, 3, activation="relu", max_pool=2, backend="torch")
    x = torch.randn(1, 3, 8, 8)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))
        assert twin.backend == "torch"
    text = repr(module)
    for part in ("3, 4, kernel_size=(3, 3)", "activation='relu'", "max_pool=2", "backend='torch'"):
        assert part in text


def test_autocast_and_compile():
    module = nn.ConvBiasAct(3, 4, 3, padding_mode="reflect", padding=1, activation="gelu")
    x = torch.randn(2, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    torch.testing.assert_close(compiled(x[:, :, :5]), module(x[:, :, :5]))


def test_bad_input():
    with raises(ValueError, "activation", "'swish'", "one of None, 'relu'"):
        nn.ConvBiasAct(3, 4, 3, activation="swish")
    with raises(TypeError, "max_pool", r"\(kernel, stride, padding\)"):
        nn.ConvBiasAct(3, 4, 3, max_pool="2")
    with raises(ValueError, "padding='same' is not supported for strided"):
        nn.Conv2d(3, 4, 3, padding="same", stride=2)
    with raises(ValueError, "x", "got 5 channels", "3 channels, as weight has"):
        nn.Conv2d(3, 4, 3)(torch.randn(1, 5, 8, 8))
    with raises(ValueError, "backend: got 'fast'"):
        nn.Conv2d(3, 4, 3, backend="fast")(torch.randn(1, 3, 8, 8))


class TestCalls:
    """A module's calls are recognised like those of the function: one kind is checked once."""

    def built(self, conv, x, monkeypatch) -> int:
        """How many problems two calls build."""
        seen = []
        build = problem.build
        with monkeypatch.context() as patched:
            counted = lambda *args: seen.append(args) or build(*args)  # noqa: E731
            patched.setattr(problem.PROBLEMS, "build", counted)
            first, second = conv(x), conv(x)
        assert torch.equal(first, second)
        return len(seen)

    @pytest.mark.parametrize("backend", ["auto", "torch", "cpu"])
    @pytest.mark.parametrize("mode", ["zeros", "reflect"])
    def test_one_kind_is_checked_once(self, backend, mode, monkeypatch):
        problem.PROBLEMS.clear()
        options = {"padding": 1, "padding_mode": mode}
        conv = nn.Conv2d(3, 4, 3, backend=backend, **options)
        stock = torch.nn.Conv2d(3, 4, 3, **options)
        stock.load_state_dict(conv.state_dict())
        x = torch.randn(2, 3, 5, 5)
        assert self.built(conv, x, monkeypatch) == 1
        assert self.built(copy.deepcopy(conv), x.clone(), monkeypatch) == 0
        torch.testing.assert_close(conv(x), stock(x))

    def test_what_changes_the_choice_is_seen(self, torch_wins):
        conv, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 5, 5)

        def taken() -> list[str]:
            with dispatch.watched() as backends:
                conv(x)
            return backends

        assert taken() == ["torch"]
        with torch.no_grad():
            assert taken() == ["torch"]
        with dispatch.preferring("cpu"):
            assert taken() == ["cpu"]
        conv.backend = "cpu"
        assert taken() == ["cpu"]
        conv.backend = "auto"
        assert taken() == ["torch"]

    def test_a_weight_that_is_no_parameter(self):
        conv, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 5, 5)
        expected = conv(x)
        torch.nn.utils.parametrize.register_parametrization(conv, "weight", torch.nn.Identity())
        torch.testing.assert_close(conv(x), expected)
        conv.parametrizations.weight.original.data.zero_()
        assert conv(x).std() < expected.std()

    def test_forward_mode_is_not_kept(self):
        conv, x = nn.Conv2d(3, 4, 3).requires_grad_(False), torch.randn(2, 3, 5, 5)
        with torch.autograd.forward_ad.dual_level():
            y = conv(torch.autograd.forward_ad.make_dual(x, x))
            assert torch.autograd.forward_ad.unpack_dual(y).tangent is not None

    def test_errors_stay_ours(self):
        conv = nn.Conv2d(3, 4, 3)
        conv(torch.randn(2, 3, 5, 5))
        for _ in range(2):
            with pytest.raises(ValueError, match="conv_bias_act: x: got 2 channels"):
                conv(torch.randn(2, 2, 5, 5))

    @pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "hardswish", "relu"])
    def test_activations_in_place_where_none_is_recorded(self, activation):
        conv = nn.ConvBiasAct(3, 4, 3, activation=activation, backend="torch")
        x = torch.randn(2, 3, 5, 5)
        recorded = conv(x)
        with torch.no_grad():
            assert torch.equal(conv(x), recorded)
        recorded.sum().backward()
        assert conv.weight.grad is not None


CONV1D = {
    "plain": {},
    "strided": {"padding": 2, "stride": 2},
    "dilated same": {"padding": "same", "dilation": 3},
    "even same": {"padding": "same", "kernel_size": 4},
    "valid": {"padding": "valid"},
    "grouped, no bias": {"groups": 2, "bias": False},
    "depthwise": {"groups": 4, "out_channels": 4, "padding": 1},
    "one tap": {"kernel_size": 1},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate"},
    "circular same": {"padding": "same", "padding_mode": "circular"},
}


@pytest.mark.parametrize("backend", ["auto", "torch", pytest.param("cpu", marks=needs_cpu)])
class TestConv1d:
    def pair(self, backend, **options):
        options = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, **options}
        torch.manual_seed(3)
        stock = torch.nn.Conv1d(**options)
        torch.manual_seed(3)
        ours = nn.Conv1d(**options, backend=backend)
        assert isinstance(ours, torch.nn.Conv1d)
        assert stock.state_dict().keys() == ours.state_dict().keys()
        for name, value in stock.state_dict().items():
            assert torch.equal(value, ours.state_dict()[name])
        return stock, ours

    @pytest.mark.filterwarnings("ignore:Using padding='same'")
    @pytest.mark.parametrize("layout", ["rows", "channels last", "unbatched"])
    @pytest.mark.parametrize("name", CONV1D)
    def test_forward_and_backward(self, backend, name, layout):
        stock, ours = self.pair(backend, **CONV1D[name])
        x = torch.randn(4, 17) if layout == "unbatched" else torch.randn(3, 4, 17)
        if layout == "channels last":
            x = torch.randn(3, 17, 4).transpose(1, 2)
        for _ in range(2):
            results = []
            for module in (stock, ours):
                leaf = x.detach().requires_grad_()
                y = module(leaf)
                leaves = (leaf, *module.parameters())
                results.append((y, *torch.autograd.grad(y.sin().sum(), leaves)))
            for a, e in zip(results[1], results[0], strict=True):
                torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)

    def test_its_weight_is_packed_once(self, backend, monkeypatch):
        _, ours = self.pair(backend)
        x = torch.randn(2, 4, 9)
        with torch.no_grad():
            first = ours(x)
            monkeypatch.setattr(packing, "_fill", None)  # what packs
            assert torch.equal(ours(x), first)

    def test_autocast_and_compile(self, backend):
        stock, ours = self.pair(backend)
        x = torch.randn(2, 4, 9)
        with torch.autocast("cpu", torch.bfloat16):
            assert ours(x).dtype == stock(x).dtype
            torch.testing.assert_close(ours(x), stock(x), rtol=2e-2, atol=2e-2)
        torch._dynamo.reset()
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), stock(x), rtol=1e-4, atol=1e-5)

    def test_bad_input(self, backend):
        _, ours = self.pair(backend)
        with raises(ValueError, "nn.Conv1d: x", "2 or 3 dimensions"):
            ours(torch.randn(1, 4, 5, 5))
        with raises(ValueError, "x: got 3 channels"):
            ours(torch.randn(1, 3, 5))
