"""conv_bias_act: the common suite, then its own properties."""

import pytest
import torch
import torch.nn.functional as F

import mbm_kernels
from mbm_kernels import nn
from mbm_kernels.ops.conv_bias_act import (
    backend_cpu,
    backend_cuda,
    geometry,
    op,
    problem,
    reference,
)
from mbm_kernels.testing import Case, OpSuite
from tests.conftest import raises

ACTIVATIONS = {
    None: lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
CHANNELS_LAST = torch.channels_last
pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")


def stock(
    x,
    weight,
    bias=None,
    *,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    residual=None,
    activation=None,
    max_pool=None,
):
    """What a user of torch writes."""
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    y = ACTIVATIONS[activation](y if residual is None else y + residual)
    if max_pool is None:
        return y
    return F.max_pool2d(y, *([max_pool] if isinstance(max_pool, int) else max_pool))


def sizes(b, c, k, y, x, r=3, s=3):
    return {"B": b, "C": c, "K": k, "Y": y, "X": x, "R": r, "S": s}


def option(**given):
    return given


def activation_cases():
    for i, name in enumerate(ACTIVATIONS):
        pool = (2, (3, 2, 1))[i % 2]
        yield Case(f"activation {name}", sizes(2, 3, 5, 7, 6), option(activation=name), scale=2.0)
        options = option(activation=name, max_pool=pool, padding=1)
        yield Case(f"activation {name} and a pool", sizes(2, 3, 5, 7, 6), options)


class TestConvBiasAct(OpSuite):
    op = "conv_bias_act"
    function = staticmethod(mbm_kernels.conv_bias_act)
    reference = staticmethod(reference.conv_bias_act)
    diff = ("x", "weight", "bias", "residual")
    cases = [
        Case(
            "everything at once",
            sizes(2, 3, 5, 7, 6),
            option(activation="silu", max_pool=2, padding=1, residual=True),
        ),
        Case("plain", sizes(2, 3, 4, 5, 7)),
        Case("no bias", sizes(1, 2, 3, 4, 5), option(bias=False, activation="relu")),
        Case(
            "captioner stem",
            sizes(2, 3, 16, 16, 16),
            option(padding=1, activation="relu", max_pool=2),
        ),
        Case("more than one tile in each", sizes(1, 19, 37, 13, 21), option(padding=1)),
        Case(
            "residual before relu",
            sizes(2, 4, 4, 5, 6),
            option(padding=1, activation="relu", residual=True),
        ),
        Case(
            "stride and unequal padding",
            sizes(2, 3, 4, 9, 8),
            option(stride=(2, 3), padding=(2, 1)),
        ),
        Case("dilation", sizes(2, 2, 3, 9, 8), option(dilation=(2, 1), padding=2)),
        Case("same with an even kernel", sizes(2, 2, 3, 6, 5, 4, 2), option(padding="same")),
        Case("same, dilated", sizes(1, 2, 3, 6, 7, 2, 3), option(padding="same", dilation=3)),
        Case("valid", sizes(1, 2, 3, 6, 7), option(padding="valid", activation="tanh")),
        Case("groups", sizes(2, 6, 4, 5, 5), option(groups=2, padding=1, activation="relu")),
        Case("depthwise with a multiplier", sizes(2, 3, 6, 5, 5), option(groups=3, max_pool=2)),
        Case("one by one kernel", sizes(2, 5, 7, 4, 3, 1, 1), option(activation="relu")),
        Case(
            "seven by seven stem",
            sizes(1, 3, 4, 12, 11, 7, 7),
            option(stride=2, padding=3, activation="relu", max_pool=(3, 2, 1)),
        ),
        Case(
            "oblong pool that overlaps",
            sizes(1, 2, 3, 9, 8),
            option(activation="relu6", max_pool=((3, 2), (1, 2), (1, 0))),
        ),
        Case(
            "unbatched",
            sizes(None, 3, 4, 6, 6),
            option(padding=1, activation="relu", max_pool=2, residual=True),
        ),
        Case("tiny magnitudes", sizes(1, 3, 4, 6, 6), option(activation="gelu"), scale=1e-3),
        Case(
            "large magnitudes saturate",
            sizes(1, 3, 4, 6, 6),
            option(activation="gelu_tanh"),
            scale=10.0,
        ),
        Case(
            "pooled map wider than the convolved, residual",
            sizes(2, 6, 9, 5, 7),
            option(padding=1, activation="relu", max_pool=(2, 1, 1), residual=True),
        ),
        Case(
            "pooled map wider, channels_last residual",
            sizes(2, 6, 9, 5, 7),
            option(padding=1, max_pool=(4, 1, 2), residual=CHANNELS_LAST),
        ),
        Case(
            "few channels, pooled map wider, residual",
            sizes(1, 3, 17, 6, 5),
            option(activation="silu", max_pool=((1, 4), 1, (0, 2)), residual=True),
        ),
        Case(
            "depthwise, pooled map wider, residual",
            sizes(1, 9, 9, 5, 6),
            option(padding=1, groups=9, activation="relu6", max_pool=(4, 1, 2), residual=True),
        ),
        Case(
            "winograd, pooled map wider, residual",
            sizes(1, 17, 19, 6, 9),
            option(padding=1, activation="relu", max_pool=((4, 2), (1, 2), (2, 1)), residual=True),
        ),
        *activation_cases(),
    ]
    edge_cases = [
        Case("all ones", sizes(1, 1, 1, 1, 1, 1, 1), option(activation="relu")),
        Case("no batch", sizes(0, 3, 4, 5, 6), option(activation="relu", max_pool=2)),
        Case("no batch, no pool", sizes(0, 3, 4, 5, 6), option(padding="same", residual=True)),
        Case("kernel as large as the image", sizes(2, 3, 4, 3, 3), option(activation="sigmoid")),
        Case("more padding than pixels", sizes(2, 2, 3, 1, 2), option(padding=3, max_pool=2)),
        Case("pool of the whole map", sizes(2, 2, 3, 5, 6), option(max_pool=((3, 4), 1, 0))),
    ]

    def takes(self, case, backend):
        if backend != "cuda":
            return True
        inputs = self.inputs(case, torch.float32)
        x, weight, bias, residual, *options = self.schema_args(inputs)[:-1]
        found = problem.find(x, weight, bias, residual, *options)
        return backend_cuda.why_not_sizes(found.sizes) is None

    def make(self, case, generator):
        b, c, k, y, x, r, s = (case.sizes[letter] for letter in "BCKYXRS")

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        options = dict(case.options)
        leading = () if b is None else (b,)
        inputs = {"x": randn(*leading, c, y, x)}
        inputs["weight"] = randn(k, c // options.get("groups", 1), r, s)
        if options.pop("bias", True):
            inputs["bias"] = randn(k)
        residual = options.pop("residual", False)
        inputs |= options
        if residual:
            before = {n: v for n, v in inputs.items() if n not in ("activation", "max_pool")}
            inputs["residual"] = randn(*stock(**before).shape)
        if residual is CHANNELS_LAST:
            inputs["residual"] = inputs["residual"].contiguous(memory_format=CHANNELS_LAST)
        return inputs

    def stock(self, inputs, backend):
        return (stock(**inputs),)

    def compare(self, evaluate, inputs, backend, *, gradient):
        channels = inputs["weight"].shape[:2]
        winograd = backend == "cpu" and min(channels) >= geometry.WINOGRAD_CHANNELS
        self.extra = backend_cpu.WINOGRAD_ERROR if winograd else 0.0
        super().compare(evaluate, inputs, backend, gradient=gradient)

    def schema_args(self, inputs):
        def pair(name):
            return geometry.pair(self.op, name, inputs.get(name, 1), 1)

        kernel = tuple(inputs["weight"].shape[2:])
        padding = geometry.explicit_padding(
            self.op, inputs.get("padding", 0), kernel, pair("stride"), pair("dilation")
        )
        return super().schema_args(
            {
                **inputs,
                "stride": pair("stride"),
                "padding": padding,
                "dilation": pair("dilation"),
                "groups": inputs.get("groups", 1),
                "max_pool": geometry.pool_window(self.op, inputs.get("max_pool")),
            }
        )

    def test_module_is_drop_in(self, backend):
        module = nn.ConvBiasAct(3, 4, 3, padding=1, activation="relu", max_pool=2, backend=backend)
        plain = torch.nn.Conv2d(3, 4, 3, padding=1)
        plain.load_state_dict(module.state_dict())
        module.load_state_dict(plain.state_dict())
        x, residual = torch.randn(2, 3, 6, 6), torch.randn(2, 4, 6, 6)
        expected = F.max_pool2d(F.relu(plain(x) + residual), 2)
        torch.testing.assert_close(module(x, residual), expected)

    @pytest.mark.parametrize("weight_format", [torch.contiguous_format, CHANNELS_LAST])
    @pytest.mark.parametrize("x_format", [torch.contiguous_format, CHANNELS_LAST])
    @pytest.mark.parametrize("max_pool", [None, 2])
    def test_layout_of_the_result_is_torchs(self, backend, x_format, weight_format, max_pool):
        x = torch.randn(2, 3, 7, 6).contiguous(memory_format=x_format)
        weight = torch.randn(5, 3, 3, 3).contiguous(memory_format=weight_format)
        options = option(padding=1, activation="relu", max_pool=max_pool)
        y = mbm_kernels.conv_bias_act(x, weight, **options, backend=backend)
        expected = stock(x, weight, **options)
        assert y.stride() == expected.stride()
        torch.testing.assert_close(y, expected)
        registered, _, _ = torch.ops.mbm_kernels.conv_bias_act(
            *self.schema_args({"x": x, "weight": weight, **options}), backend
        )
        assert registered.stride() == expected.stride()
        fake_args = self.schema_args({"x": x.to("meta"), "weight": weight.to("meta"), **options})
        fake, _, _ = torch.ops.mbm_kernels.conv_bias_act(*fake_args, backend)
        assert fake.stride() == y.stride()

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("max_pool", [None, 2, (3, 1, 1)])
    def test_ties_are_torchs(self, activation, max_pool, backend):
        # Small whole numbers: every sum is exact, most windows hold ties.
        dtype = torch.float64 if backend == "torch" else torch.float32
        x = torch.randint(-1, 2, (2, 2, 6, 8)).to(dtype).requires_grad_()
        weight = torch.randint(-1, 2, (3, 2, 3, 3)).to(dtype).requires_grad_()
        residual = torch.randint(-1, 2, (2, 3, 6, 8)).to(dtype).requires_grad_()
        eps = torch.finfo(dtype).eps
        options = option(padding=1, activation=activation, max_pool=max_pool)
        results = []
        for call in (stock, mbm_kernels.conv_bias_act):
            extra = {} if call is stock else {"backend": backend}
            y = call(x, weight, residual=residual, **options, **extra)
            grad = torch.arange(y.numel(), dtype=y.dtype).view_as(y)
            results.append((y, *torch.autograd.grad(y, (x, weight, residual), grad)))
        for actual, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=500 * eps, atol=5e4 * eps)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("max_pool", [None, 2])
    def test_nan_and_infinity_are_torchs(self, activation, max_pool, backend):
        x = torch.randn(1, 1, 8, 8)
        x[0, 0, 1, 1], x[0, 0, 1, 6], x[0, 0, 6, 1] = float("nan"), float("inf"), -float("inf")
        weight = torch.tensor([1.0]).view(1, 1, 1, 1)
        options = option(activation=activation, max_pool=max_pool)
        y = mbm_kernels.conv_bias_act(x, weight, **options, backend=backend)
        # oneDNN's gelu makes NaN of infinity, where the definition has infinity.
        define = reference.conv_bias_act if activation == "gelu" and backend != "torch" else stock
        torch.testing.assert_close(y, define(x, weight, **options), equal_nan=True)
        assert y.isnan().any()

    def test_inputs_are_left_alone(self, backend):
        inputs = self.inputs(self.cases[5], torch.float32)
        before = {n: v.clone() for n, v in inputs.items() if isinstance(v, torch.Tensor)}
        inputs["x"].requires_grad_()
        y = mbm_kernels.conv_bias_act(**{**inputs, "residual": inputs["x"]}, backend=backend)
        y.sum().backward()
        mbm_kernels.conv_bias_act(**inputs, backend=backend)
        assert all(torch.equal(inputs[n], value) for n, value in before.items())

    @pytest.mark.parametrize("name", ["x", "residual"])
    def test_vmap_over_one_input(self, name, backend):
        inputs = self.inputs(self.cases[0], torch.float32)
        several = torch.randn(3, *inputs.pop(name).shape)

        def call(value):
            return mbm_kernels.conv_bias_act(**inputs, **{name: value}, backend=backend)

        expected = torch.stack([call(value) for value in several])
        torch.testing.assert_close(torch.vmap(call)(several), expected)

    def test_row_does_not_depend_on_its_batch(self, backend):
        inputs = self.inputs(self.cases[3], torch.float32)
        inputs["x"] = torch.randn(5, 3, 16, 16)
        (whole,) = self.run(inputs, backend)
        inputs["x"] = inputs["x"][3:4]
        torch.testing.assert_close(self.run(inputs, backend)[0], whole[3:4], rtol=1e-5, atol=1e-5)

    def test_sizes_that_torch_rejects(self):
        weight = torch.randn(4, 3, 3, 3)
        for call in (stock, mbm_kernels.conv_bias_act):
            with pytest.raises(RuntimeError):
                call(torch.randn(2, 3, 0, 5), weight, padding=3)

    def test_bad_input(self):
        good = {"x": torch.randn(2, 4, 6, 6), "weight": torch.randn(6, 2, 3, 3), "groups": 2}

        def call(**changes):
            return mbm_kernels.conv_bias_act(**{**good, **changes})

        assert call().shape == (2, 6, 4, 4)
        with raises(TypeError, "conv_bias_act: x", "torch.Tensor"):
            call(x=[1.0])
        with raises(ValueError, "x", "2 dimensions|3 or 4 dimensions"):
            call(x=torch.randn(4, 6))
        with raises(ValueError, "weight", "4 dimensions"):
            call(weight=torch.randn(6, 2, 3))
        with raises(ValueError, "x", "got 4 channels", "2 channels, as weight has"):
            call(groups=1)
        with raises(ValueError, "groups", "got 4", "divisor of K = 6"):
            call(groups=4)
        with raises(TypeError, "groups", "an int"):
            call(groups=2.0)
        with raises(ValueError, "bias", r"\[K\] = \[6\]"):
            call(bias=torch.randn(5))
        with raises(ValueError, "residual", r"\[2, 6, 4, 4\]"):
            call(residual=torch.randn(2, 6, 6, 6))
        with raises(TypeError, "bias", "float64", "float32 as x"):
            call(bias=torch.randn(6).double())
        with raises(TypeError, "x", "torch.int64", "float64, float32"):
            call(x=torch.ones(2, 4, 6, 6, dtype=torch.int64))
        with raises(ValueError, "weight", "meta", "cpu as x"):
            call(weight=good["weight"].to("meta"))
        with raises(ValueError, "padding", "'half'", "'same', 'valid'"):
            call(padding="half")
        with raises(ValueError, "stride", "stride 1 with padding='same'"):
            call(padding="same", stride=2)
        with raises(TypeError, "padding", "a pair of ints"):
            call(padding=1.5)
        with raises(TypeError, "stride", "a pair of ints"):
            call(stride=(1, 2, 3))
        with raises(ValueError, "padding", "-1", "numbers >= 0"):
            call(padding=-1)
        with raises(ValueError, "dilation", "numbers >= 1"):
            call(dilation=0)
        with raises(ValueError, "activation", "'swish'", "'silu'"):
            call(activation="swish")
        with raises(TypeError, "max_pool", r"\(kernel, stride, padding\)"):
            call(max_pool=(2, 2))
        with raises(ValueError, "max_pool's padding", "at most half"):
            call(max_pool=(2, 2, 2))
        with raises(ValueError, "max_pool", "kernel 5", "within the 4 of Y"):
            call(max_pool=5)
        with raises(ValueError, "weight", "dilated kernel of 7", "padded input's 6 in Y"):
            call(dilation=3)
        with raises(ValueError, "weight", "at least one channel"):
            call(x=torch.randn(2, 0, 6, 6), weight=torch.randn(6, 0, 3, 3), groups=1)


def test_every_activation_is_named():
    assert set(op.ACTIVATIONS) == set(ACTIVATIONS)
