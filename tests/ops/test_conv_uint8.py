"""conv_bias_act of images as bytes: one answer, of every backend."""

import pytest
import torch

import mbm_kernels
from mbm_kernels import nn
from mbm_kernels.ops.conv_bias_act import reference
from mbm_kernels.testing import Case
from mbm_kernels.testing.emulation import Emulated
from tests.conftest import raises
from tests.ops import test_conv_bias_act as suite
from tests.ops.test_conv_bias_act import CHANNELS_LAST, option, sizes

STEM = option(padding=1, activation="relu", max_pool=2)
CASES = [
    Case("stem", sizes(2, 3, 16, 10, 12), STEM),
    Case("no pool, residual", sizes(1, 4, 5, 7, 6), option(activation="silu", residual=True)),
    Case("seven by seven", sizes(1, 1, 9, 13, 12, 7, 7), option(stride=2, padding=3, max_pool=2)),
    Case("depthwise", sizes(2, 5, 5, 8, 7), option(groups=5, padding=1, activation="relu6")),
    Case("unbatched", sizes(None, 3, 4, 6, 6), STEM),
    Case("no batch", sizes(0, 3, 4, 5, 6), STEM),
]


class _Bytes(suite.TestConvBiasAct):
    """The suite's rule of errors, for x of bytes; weights as small as a first layer's of them."""

    diff = ("weight", "bias", "residual")

    def inputs(self, case, dtype, seed=0):
        found = super().inputs(case, dtype, seed)
        generator = torch.Generator().manual_seed(seed)
        found["x"] = torch.randint(0, 256, found["x"].shape, generator=generator).byte()
        found["weight"] = found["weight"] / 64
        return found

    def stock(self, inputs, backend):
        inputs = {**inputs, "x": inputs["x"].to(inputs["weight"].dtype)}
        return super().stock(inputs, backend)


def _check(suite, case, backend, dtype, layout=torch.contiguous_format):
    inputs = suite.inputs(case, dtype)
    if inputs["x"].dim() == 4:
        inputs["x"] = inputs["x"].contiguous(memory_format=layout)
    suite.check_forward(inputs, backend)
    suite.check_backward(inputs, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ["auto", "torch", "cpu", "triton"])
def test_bytes_are_their_values(backend, case, dtype):
    if backend in ("cpu", "triton") and dtype is torch.float64:
        pytest.skip("it computes in float32")
    if reason := mbm_kernels.backends("conv_bias_act").get(backend):
        pytest.skip(reason)
    for layout in (torch.contiguous_format, CHANNELS_LAST):
        _check(_Bytes(), case, backend, dtype, layout)


class TestEmulated(Emulated):
    @pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_bytes_are_their_values(self, case, dtype, layout):
        _check(_Bytes(), case, "cuda", dtype, layout)

    def test_strides_of_a_part_of_an_image(self):
        whole = torch.randint(0, 256, (2, 12, 13, 4)).byte()
        x = whole.permute(0, 3, 1, 2)[:, :3, 1:, 2:]
        weight = torch.randn(8, 3, 3, 3).bfloat16() / 64
        y = mbm_kernels.conv_bias_act(x, weight, **STEM, backend="cuda")
        expected = mbm_kernels.conv_bias_act(x.bfloat16(), weight, **STEM, backend="cuda")
        assert torch.equal(y, expected)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_the_result_has_the_weights_dtype(backend):
    x, weight = torch.randint(0, 256, (1, 3, 8, 8)).byte(), torch.randn(4, 3, 3, 3)
    y = mbm_kernels.conv_bias_act(x, weight, backend=backend)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, torch.conv2d(x.float(), weight), rtol=1e-5, atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        y = mbm_kernels.conv_bias_act(x, weight, backend=backend)
    assert y.dtype == torch.bfloat16
    fake = torch.ops.mbm_kernels.conv_bias_act(
        *_Bytes().schema_args({"x": x.to("meta"), "weight": weight.to("meta")}), backend
    )[0]
    assert fake.dtype == torch.float32


def test_compiled_and_differentiated_twice():
    x = torch.randint(0, 256, (1, 3, 8, 8)).byte()
    weight = (torch.randn(4, 3, 3, 3) / 64).requires_grad_()

    def call(weight, backend):
        return mbm_kernels.conv_bias_act(x, weight, activation="tanh", backend=backend)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    expected = reference.conv_bias_act(x, weight, activation="tanh")
    torch.testing.assert_close(compiled(weight, "cpu"), expected)
    y = call(weight, "cpu")
    (first,) = torch.autograd.grad(y.square().sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weight)
    (wanted,) = torch.autograd.grad(expected.square().sum(), weight, create_graph=True)
    (wanted,) = torch.autograd.grad(wanted.sum(), weight)
    torch.testing.assert_close(second, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def test_what_is_refused():
    x, weight = torch.randint(0, 256, (1, 3, 8, 8)).byte(), torch.randn(4, 3, 3, 3)
    with raises(TypeError, "weight", r"torch.uint8", "float64, float32, bfloat16, float16"):
        mbm_kernels.conv_bias_act(x, weight.byte())
    with raises(TypeError, "bias", "float64", "float32 as weight"):
        mbm_kernels.conv_bias_act(x, weight, torch.randn(4).double())
    with raises(ValueError, "x", "meta", "cpu as weight"):
        mbm_kernels.conv_bias_act(x.to("meta"), weight)
    with raises(TypeError, "x", "torch.int8", "uint8"):
        mbm_kernels.conv_bias_act(x.to(torch.int8), weight)


def test_torchs_own_layers_take_none():
    """Our Conv2d is torch's, which refuses them; ConvBiasAct is the operation."""
    x = torch.randint(0, 256, (1, 3, 8, 8)).byte()
    for backend in ("auto", "cpu"):
        for conv in (torch.nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3, backend=backend)):
            with pytest.raises(RuntimeError, match="Input type"):
                conv(x)
    module = nn.ConvBiasAct(3, 4, 3, activation="relu", backend="cpu")
    torch.testing.assert_close(module(x), torch.relu(torch.nn.Conv2d.forward(module, x.float())))
