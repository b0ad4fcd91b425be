"""conv_bias_act's Triton kernels past every tile, whichever of them launch.json takes."""

import pytest
import torch

import mbm_kernels
from mbm_kernels._core import triton_launch
from mbm_kernels.ops.conv_bias_act import problem
from mbm_kernels.ops.conv_bias_act.plan import Plan
from mbm_kernels.testing import Case
from mbm_kernels.testing.suite import placed

from . import test_conv_bias_act as common
from .test_conv_bias_act import CHANNELS_LAST, option, sizes, stock

pytestmark = common.pytestmark
suite = common.TestConvBiasAct()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("x", "weight", "bias", "residual")
WAYS = {"gemm": "conv", "depthwise": "depthwise", "aten": "epilogue"}
# Tiles: 64 or 128 pixels, 64 channels out, 16, 32 or 64 in; depthwise 32 by 64 or 128 by 16.
CASES = [
    Case(
        "gemm, two tiles in each and a pool",
        sizes(1, 35, 70, 19, 16),
        option(padding=1, activation="relu", max_pool=2, residual=True),
    ),
    Case(
        "gemm without a pool",
        sizes(2, 66, 65, 9, 8),
        option(padding=1, activation="silu", residual=True),
    ),
    Case("gemm, stride", sizes(2, 17, 9, 11, 10), option(stride=2, padding=1, max_pool=2)),
    Case("gemm, even kernel", sizes(2, 18, 9, 6, 5, 4, 2), option(padding="same", bias=False)),
    Case("gemm, one by one", sizes(2, 20, 12, 5, 4, 1, 1), option(activation="tanh", max_pool=2)),
    Case("gemm, more padding than kernel", sizes(1, 16, 8, 3, 4, 2, 2), option(padding=3)),
    Case(
        "gemm, first layer",
        sizes(2, 3, 65, 25, 22, 7, 7),
        option(stride=2, padding=3, activation="leaky_relu", max_pool=2),
    ),
    Case("gemm, one channel", sizes(2, 1, 5, 6, 7), option(padding=1, activation="relu6")),
    Case(
        "depthwise, two tiles in each and a pool",
        sizes(1, 67, 67, 17, 18),
        option(groups=67, padding=1, activation="hardswish", max_pool=2, residual=True),
    ),
    Case(
        "depthwise, stride",
        sizes(1, 5, 5, 23, 14, 5, 3),
        option(groups=5, padding=(2, 1), stride=(2, 1), activation="relu"),
    ),
]
NCHW = torch.contiguous_format
FORMS = [(CHANNELS_LAST, torch.float32), (NCHW, torch.float32)]
LARGE = (
    "gemm, two tiles in each and a pool",
    "gemm without a pool",
    "depthwise, two tiles in each and a pool",
)
ROUNDED = ("gemm, stride", "gemm, first layer", "depthwise, stride")


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that ran, in order."""
    found = []
    launch = Plan.launch

    def note(plan, name, *args, **constexprs):
        found.append(name)
        launch(plan, name, *args, **constexprs)

    monkeypatch.setattr(Plan, "launch", note)
    return found


def force(monkeypatch, way):
    def choose(plan, what):
        return way if plan.covered(way, what) else "aten"

    monkeypatch.setattr(Plan, "way", choose)


def in_layout(inputs, layout):
    return {
        n: v.contiguous(memory_format=layout) if isinstance(v, torch.Tensor) and v.dim() == 4 else v
        for n, v in inputs.items()
    }


# The largest cases take five seconds each in the interpreter.
EVERY_WAY = [
    (case, *form) for case in CASES for form in (FORMS[:1] if case.why in LARGE else FORMS)
] + [(case, CHANNELS_LAST, torch.bfloat16) for case in CASES if case.why in ROUNDED]


@pytest.mark.parametrize(("case", "layout", "dtype"), EVERY_WAY, ids=str)
def test_every_way(case, layout, dtype, monkeypatch, launched):
    way = case.why.split(",")[0].split()[0]
    force(monkeypatch, way)
    inputs = in_layout(placed(suite.inputs(case, dtype), DEVICE), layout)
    run, strides = suite.run, set()

    def noting(given, backend):
        outputs = run(given, backend)
        strides.add(outputs[0].stride())
        return outputs

    monkeypatch.setattr(suite, "run", noting)
    suite.check_forward(inputs, "triton")
    suite.check_backward(inputs, "triton")
    assert any(name.startswith(WAYS[way]) for name in launched)
    assert f"{WAYS[way]}_grad_weight" in launched
    assert strides == {stock(**inputs).stride()}


@pytest.mark.parametrize("way", WAYS)
def test_the_table_chooses(way, launched):
    groups = {"depthwise": 16}.get(way, 1)
    dilation = 2 if way == "aten" else 1
    x = torch.randn(1, 16, 8, 8, device=DEVICE).bfloat16()
    x = x.contiguous(memory_format=CHANNELS_LAST)
    weight = torch.randn(16, 16 // groups, 3, 3, device=DEVICE).bfloat16().requires_grad_()
    options = option(groups=groups, dilation=dilation, padding=1, max_pool=2)
    y = mbm_kernels.conv_bias_act(x.requires_grad_(), weight, **options, backend="triton")
    y.sum().backward()
    assert (
        launched
        == {
            "aten": ["epilogue", "grad_epilogue"],
            "gemm": ["conv_pool", "grad_epilogue", "conv_grad_x", "conv_grad_weight"],
            "depthwise": [
                "depthwise",
                "grad_epilogue",
                "depthwise_grad_x",
                "depthwise_grad_weight",
            ],
        }[way]
    )


def test_float32_follows_the_switch_for_tf32(launched):
    x, weight = torch.randn(1, 3, 6, 6, device=DEVICE), torch.randn(16, 3, 3, 3, device=DEVICE)
    for precision, expected in (("tf32", "conv_stem"), ("ieee", "epilogue")):
        before = torch.backends.cudnn.conv.fp32_precision
        torch.backends.cudnn.conv.fp32_precision = precision
        try:
            mbm_kernels.conv_bias_act(x, weight, backend="triton")
        finally:
            torch.backends.cudnn.conv.fp32_precision = before
        assert launched.pop() == expected


@pytest.mark.parametrize(
    ("needed", "expected"),
    [
        (("bias",), ["grad_epilogue"]),
        (("residual",), ["grad_epilogue"]),
        (("x",), ["grad_epilogue", "conv_stem"]),
        (("weight",), ["grad_epilogue", "conv_grad_weight"]),
    ],
    ids=str,
)
def test_only_needed_gradients_are_made(needed, expected, monkeypatch, launched):
    force(monkeypatch, "gemm")
    inputs = placed(suite.inputs(common.TestConvBiasAct.cases[5], torch.float32), DEVICE)
    for name in NAMES:
        inputs[name].requires_grad_(name in needed)
    y = mbm_kernels.conv_bias_act(**inputs, backend="triton")
    launched.clear()
    y.sum().backward()
    assert launched == expected


POOLS = [(3, 2, 1), (2, 3, 0), ((2, 3), (1, 2), (1, 1)), (5, 2, 2), (5, 5, 1), (3, 1, 1)]


OF_ALL_KINDS = [(CHANNELS_LAST, a) for a in (None, "relu", "leaky_relu", "silu")]


@pytest.mark.parametrize(("layout", "activation"), [*OF_ALL_KINDS, (NCHW, "relu")], ids=str)
@pytest.mark.parametrize("max_pool", POOLS, ids=str)
def test_pools_of_any_kind_are_torchs(max_pool, layout, activation):
    """Ties, NaN and windows of -infinity included."""
    x = torch.randint(-3, 4, (2, 3, 11, 12), device=DEVICE).float()
    if activation != "silu":  # whose slope is NaN there, also where torch's gradient is 0
        x[0, 0, 2:4, 2:5], x[1, 1] = float("nan"), -float("inf")
    x = x.contiguous(memory_format=layout).requires_grad_()
    weight = torch.ones(3, 1, 1, 1, device=DEVICE)
    results = []
    for call, extra in ((stock, {}), (mbm_kernels.conv_bias_act, {"backend": "triton"})):
        y = call(x, weight, groups=3, activation=activation, max_pool=max_pool, **extra)
        grad = torch.arange(y.numel(), dtype=y.dtype, device=DEVICE).view_as(y)
        results.append((y, *torch.autograd.grad(y, x, grad)))
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_conditions_of_the_tables_are_sizes():
    x = torch.randn(1, 3, 4, 4)
    weight = torch.randn(2, 3, 1, 1)
    options = ((1, 1), (0,) * 4, (1, 1), 1, None, None)
    plan = Plan(problem.find(x, weight, None, None, *options), x, weight)
    tables = (
        triton_launch.read_choices("conv_bias_act"),
        triton_launch.read_configs("conv_bias_act"),
    )
    conditions = [
        c for table in tables for entries in table.values() for e in entries for c in e.where
    ]
    assert {name for name, *_ in conditions} <= plan.sizes.keys()


def test_windows_beyond_a_byte_are_refused():
    x, weight = torch.randn(1, 1, 12, 12, device=DEVICE), torch.randn(1, 1, 1, 1, device=DEVICE)
    with pytest.raises(mbm_kernels.BackendUnavailableError, match="128 pixels, not 144"):
        mbm_kernels.conv_bias_act(x, weight, max_pool=12, backend="triton")
