"""The CUDA C++ kernels of conv_bias_act, emulated: the suite where they take it, and their own."""

import pytest
import torch

import mbm_kernels
from mbm_kernels.ops.conv_bias_act import backend_cuda
from mbm_kernels.testing import Case
from mbm_kernels.testing.emulation import Emulated
from tests.conftest import raises
from tests.ops import test_conv_bias_act as suite
from tests.ops.test_conv_bias_act import CHANNELS_LAST, option, sizes

STEM_5 = option(stride=2, padding=2, activation="relu", max_pool=2)


def depthwise_cases():
    """Every kernel and stride; strips past the end, channels past a block, tiles past one."""
    for taps in (3, 5, 7):
        for stride in (1, 2):
            options = option(groups=6, stride=stride, padding=taps // 2, activation="relu")
            yield Case(
                f"depthwise {taps} of stride {stride}", sizes(2, 6, 6, 9, 8, taps, taps), options
            )
    yield Case("depthwise, several blocks", sizes(1, 35, 35, 6, 37), option(groups=35, padding=1))
    yield Case(
        "depthwise, pooled",
        sizes(2, 33, 33, 7, 6),
        option(groups=33, padding=1, activation="silu", max_pool=(3, 2, 1), residual=True),
    )


class TestEmulated(Emulated, suite.TestConvBiasAct):
    cases = [
        *suite.TestConvBiasAct.cases,
        *depthwise_cases(),
        Case("five by five, several blocks", sizes(1, 4, 35, 19, 37, 5, 5), STEM_5),
        Case("several tiles of channels, of x and of its gradient", sizes(1, 1, 33, 18, 70)),
    ]

    # Several tiles of a block and outputs past 64; windows past the last whole 8; one tile.
    @pytest.mark.parametrize("rounded", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize(
        ("shape", "activation", "layout"),
        [
            ((2, 3, 72, 18, 70), "relu", CHANNELS_LAST),
            ((1, 4, 8, 7, 9), None, torch.contiguous_format),
            ((1, 1, 64, 11, 20), "relu", torch.contiguous_format),
        ],
    )
    def test_matrix_instructions(self, backend, shape, activation, layout, rounded):
        options = option(activation=activation, max_pool=2, padding=1)
        inputs = self.inputs(Case("", sizes(*shape), options), rounded)
        inputs["x"] = inputs["x"].contiguous(memory_format=layout)
        self.check_forward(inputs, backend)
        self.check_backward(inputs, backend)

    def test_matrix_instructions_pool_as_exact_products_do(self, backend):
        """Ties, NaN, infinity; exact products take a residual."""
        x = torch.randint(-1, 2, (1, 3, 12, 24)).bfloat16()
        x[0, 0, 3, 4], x[0, 1, 9, 20], x[0, 2, 6, 11] = float("nan"), float("inf"), -float("inf")
        weight = torch.randint(-1, 2, (16, 3, 3, 3)).bfloat16()
        grad = torch.randn(1, 16, 5, 11).bfloat16()
        results = []
        for residual in (None, torch.zeros(1, 16, 10, 22).bfloat16()):
            given = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
            options = option(activation="relu", max_pool=2, residual=residual, backend=backend)
            y = mbm_kernels.conv_bias_act(*given, **options)
            results.append((y, *torch.autograd.grad(y, given, grad)))
        assert results[0][0].isnan().any()
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("groups", [1, 5])
    def test_layouts_agree_to_the_bit(self, backend, groups):
        channels = 3 if groups == 1 else 5
        x, weight = torch.randn(2, channels, 9, 8), torch.randn(5, channels // groups, 3, 3)
        options = option(padding=1, groups=groups, activation="gelu", max_pool=2, backend=backend)
        results = []
        for layout in (torch.contiguous_format, CHANNELS_LAST):
            given = [t.contiguous(memory_format=layout).requires_grad_() for t in (x, weight)]
            y = mbm_kernels.conv_bias_act(*given, **options)
            results.append((y, *torch.autograd.grad(y, given, torch.ones_like(y))))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_a_gradient_alone(self, backend):
        inputs = self.inputs(self.cases[0], torch.float32)
        y = mbm_kernels.conv_bias_act(**inputs, backend=backend)
        grads = [torch.randn_like(y)]

        def run(given):
            return (mbm_kernels.conv_bias_act(**given, backend=backend),)

        every = self.gradients(run, inputs, grads)
        for name in self.diff:
            alone = type(self)()
            alone.diff = (name,)
            assert torch.equal(alone.gradients(run, inputs, grads)[name], every[name])


def test_limits_are_the_kernels():
    extension = pytest.importorskip("mbm_kernels._C_cuda_emulated")
    assert extension.conv_cuda_limits == [
        backend_cuda.MOST_CHANNELS,
        backend_cuda.MOST_TAPS,
        backend_cuda.MOST_STRIDE,
        backend_cuda.LARGEST_POOL,
        backend_cuda.LARGEST_DEPTHWISE_POOL,
    ]


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ((5, 4, 3, 3), {}, "up to 4 channels in one group, not 5"),
        ((4, 4, 3, 3), {"groups": 2}, "as many as channels in and out, not 2"),
        ((2, 4, 3, 3), {"dilation": 2}, "no dilation"),
        ((2, 4, 3, 3), {"stride": (1, 2)}, "strides of 1 and 2, the same for Y and X"),
        ((2, 4, 3, 8), {}, "up to 7 a side"),
        ((4, 4, 2, 2), {"groups": 4}, "3x3, 5x5 and 7x7"),
        ((4, 4, 3, 3), {"groups": 4, "max_pool": 5}, "windows of up to 16 pixels, not 25"),
        ((2, 4, 3, 3), {"max_pool": 12}, "windows of up to 128 pixels, not 144"),
    ],
)
def test_what_it_does_not_take(shape, options, reason):
    channels, outputs, *kernel = shape
    weight = torch.randn(outputs, channels // options.get("groups", 1), *kernel)
    with raises(mbm_kernels.BackendUnavailableError, "'cuda' cannot run", reason):
        mbm_kernels.conv_bias_act(
            torch.randn(1, channels, 20, 20), weight, **options, backend="cuda"
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="it runs here")
def test_the_public_backend_refuses_without_a_device():
    assert mbm_kernels.backends("conv_bias_act")["cuda"] == "no CUDA device: torch sees none"
    with raises(mbm_kernels.BackendUnavailableError, "'cuda' cannot run: no CUDA device"):
        mbm_kernels.conv_bias_act(torch.randn(1, 3, 5, 5), torch.randn(2, 3, 3, 3), backend="cuda")
