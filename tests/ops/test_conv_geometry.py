"""conv_bias_act's strides, paddings, dilations and pools, however large, and dispatch by them."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, seed, settings

import mbm_kernels
from mbm_kernels import nn
from mbm_kernels._core import cost, dispatch, native
from mbm_kernels.ops.conv_bias_act import geometry
from mbm_kernels.testing import cases
from mbm_kernels.testing.strategies import conv_bias_act as strategy
from tests import children
from tests.conftest import raises

BACKENDS = [b for b in ("cpu", "torch", "auto") if b != "cpu" or native.cpu_reason() is None]
FAR = 2**29  # the most padding
# B, C, K, groups of the algorithms that pack strips, phases or zeros between pixels.
LAYERS = {
    "few channels": (2, 2, 3, 1),
    "direct": (1, 9, 5, 1),
    "grouped": (1, 10, 12, 2),
    "depthwise": (2, 11, 11, 11),
}
OPTIONS = {
    "stride": {"stride": (7, 8192), "padding": 1},
    "stride of 2^60": {"stride": 2**60, "padding": 1},
    "stride of 2^63 - 1": {"stride": (2**63 - 1, 1)},
    "padding": {"stride": 8192, "padding": 8192},
    "unequal padding": {"stride": (3, 2**20), "padding": (1, 2**20)},
    "most padding": {"stride": FAR, "padding": FAR},
    "dilation": {"dilation": 2**20, "padding": 2**20},
    "most dilation": {"dilation": FAR, "padding": FAR},
    "strided and dilated": {
        "stride": 2**20,
        "padding": 2**20 + 2**19,
        "dilation": (2**20, 2**19),
    },
}

# Of these PyTorch's own float32 convolution ends the process (torch 2.13, oneDNN 3).
STOCK_ENDS = (("few channels", "unequal padding"), ("depthwise", "most padding"))
FAR_CALLS = [
    (name, options, backend)
    for name in LAYERS
    for options in OPTIONS
    for backend in BACKENDS
    if backend == "cpu" or (name, options) not in STOCK_ENDS
]


def results(call, x, weight, **options):
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    y = call(*leaves, **options)
    grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return y, *torch.autograd.grad(y, leaves, grad)


def layer(name, layout=torch.contiguous_format):
    batch, channels, outputs, groups = LAYERS[name]
    x = torch.randn(batch, channels, 4, 5).contiguous(memory_format=layout)
    return x, torch.randn(outputs, channels // groups, 3, 3), {"groups": groups}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("name", "options", "backend"), FAR_CALLS)
def test_steps_far_past_the_input_are_torchs(name, options, layout, backend):
    x, weight, groups = layer(name, layout)
    given = groups | OPTIONS[options]
    expected = results(lambda x, w: F.conv2d(x, w, **given), x.double(), weight.double())
    actual = results(mbm_kernels.conv_bias_act, x, weight, **given, backend=backend)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, check_dtype=False, rtol=1e-5, atol=1e-5)


def test_modules_take_them_too():
    x = torch.randn(1, 6, 5, 4)
    for module in (nn.Conv2d(6, 6, 3, stride=2**60, backend="cpu"), nn.ConvBiasAct(6, 6, 3, 2**60)):
        assert module(x).shape == (1, 6, 1, 1)
    with raises(ValueError, "padding: got", "at most 536870912 pixels a side; reduce it"):
        nn.Conv2d(6, 6, 3, padding=2**59, stride=2**59)(x)
    with raises(ValueError, "max_pool's padding", "at most 536870912"):
        nn.ConvBiasAct(6, 6, 3, max_pool=(2**60, 1, 2**59))


MEMORY = """
import resource, torch, mbm_kernels
from tests.ops.test_conv_geometry import LAYERS, OPTIONS, layer, results
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before = peak()
for name in LAYERS:
    for options in OPTIONS.values():
        x, weight, groups = layer(name)
        results(mbm_kernels.conv_bias_act, x, weight, **groups, **options, backend="cpu")
print(peak() - before)
"""


@pytest.mark.skipif(native.cpu_reason() is not None, reason="needs _C_cpu")
def test_memory_does_not_grow_with_a_stride_or_padding():
    run = children.python("-c", MEMORY)
    assert int(run.stdout) < 64  # MiB


@pytest.mark.parametrize("backend", BACKENDS)
def test_absurd_numbers_are_refused(backend):
    x, weight = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3)

    def call(**options):
        return mbm_kernels.conv_bias_act(x, weight, **options, backend=backend)

    far = r"at most 536870912 pixels a side; reduce it"
    with raises(ValueError, "padding: got 576460752303423488", far):
        call(padding=2**59, stride=2**59)
    with raises(ValueError, "padding", far):
        call(padding=(0, FAR + 1), stride=2**30)
    with raises(ValueError, "padding: got 'same'", far):
        call(padding="same", dilation=2**60)
    with raises(ValueError, "weight: got a dilated kernel of", "within the padded input's 4 in Y"):
        call(dilation=2**62)
    with raises(ValueError, "max_pool's padding", far):
        call(max_pool=(2**60, 1, 2**59))
    with raises(ValueError, "max_pool: got kernel", "within the 2 of Y"):
        call(max_pool=2**60)


@pytest.mark.skipif(native.cpu_reason() is not None, reason="needs _C_cpu")
def test_the_registered_operation_hands_nothing_absurd_to_a_kernel():
    x, weight = torch.randn(1, 8, 4, 4), torch.randn(2, 8, 3, 3)

    def call(stride, padding, max_pool):
        rest = (stride, padding, [1, 1], 1, None, max_pool, True, "cpu")
        return torch.ops.mbm_kernels.conv_bias_act(x, weight, None, None, *rest)

    with raises(ValueError, "got a stride, dilation, padding or window of", "expected 1 to"):
        call([2**60, 2**60], [1, 1, 1, 1], None)
    with raises(ValueError, "got a stride, dilation, padding or window of", "expected 0 to"):
        call([2**32, 2**32], [2**40] * 4, None)
    with raises(ValueError, "got a stride, dilation, padding or window of"):
        call([1, 1], [1, 1, 1, 1], [2, 2, 2**60, 1, 0, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pool_of_any_stride_is_stocks_where_that_has_one(backend):
    x, weight = torch.randn(2, 6, 7, 9), torch.randn(5, 6, 3, 3)
    for steps, widest in ((2**60, 2**20), ((2**63 - 1, 3), (2**20, 3))):
        y = mbm_kernels.conv_bias_act(x, weight, max_pool=(3, steps, 1), backend=backend)
        stock = F.max_pool2d(F.conv2d(x, weight), 3, widest, 1)
        torch.testing.assert_close(y, stock, rtol=1e-5, atol=1e-5)
    y = mbm_kernels.conv_bias_act(x, weight, max_pool=1, backend=backend)
    torch.testing.assert_close(y, F.conv2d(x, weight), rtol=1e-5, atol=1e-5)


def told(monkeypatch, **options):
    """The sizes that dispatch judges a call by."""
    found = {}
    monkeypatch.setattr(dispatch, "select", lambda *args: found.update(args[-1]) or "torch")
    x, weight = (torch.empty(s, device="meta") for s in ((16, 64, 56, 56), (64, 64, 3, 3)))
    mbm_kernels.conv_bias_act(x, weight, **{"padding": 1, **options})
    monkeypatch.undo()
    return found


def kernel(sizes) -> str:
    """The kernel that the cost model takes a call for."""
    machine = {"threads": 2, "lanes": 8, "near_cache": 1 << 19, "cache": 1 << 25}
    return cost.work_of("conv_bias_act").cpu({**sizes, **machine}).kernel


OTHER_POOLS = (
    *(3, 4, (3, 3, 0), (2, 1, 0), (2, 1, 1), (2, 2, 1), (4, 1, 2), (1, 2, 0), (3, 2, 0), (3, 2, 1)),
    *(((2, 3), 2, 0), ((2, 2), (2, 1), 0), ((2, 2), 2, (0, 1)), ((1, 2), 1, 0), ((2, 1), 2, 0)),
)


def test_the_cost_model_tells_pools_apart(monkeypatch):
    for known in (None, 2, (2, 2, 0), ((2, 2), (2, 2), (0, 0)), 1):
        assert kernel(told(monkeypatch, max_pool=known)) == "winograd", known
    for other in OTHER_POOLS:
        assert kernel(told(monkeypatch, max_pool=other)) != "winograd", other
    assert kernel(told(monkeypatch, stride=(1, 2))) != "winograd"
    assert kernel(told(monkeypatch, padding=2, dilation=(1, 2))) != "winograd"


def test_drawn_cases_hold_every_kind_of_pool():
    kernels, paddings, steps, wider = set(), set(), set(), set()

    def each(drawn):
        pool = drawn.inputs["max_pool"]
        if not isinstance(pool, tuple):
            return
        for kernel, step, padding in zip(*map(strategy.pair, pool), strict=True):
            kernels.add(kernel)
            steps.add(step)
            paddings.add((kernel, padding))
        options = {n: drawn.inputs[n] for n in ("stride", "padding", "dilation", "groups")}
        meta = (drawn.inputs[n].to("meta") for n in ("x", "weight"))
        width = F.conv2d(*meta, None, **options).size(-1)
        pooled = geometry.pooled((width, width), geometry.pool_window("cases", pool))[1]
        if pooled > width:
            wider.add(drawn.stratum)

    for number, stratum in enumerate(cases.strata("conv_bias_act")):
        if "pool" in stratum:
            every = settings(
                max_examples=12,
                database=None,
                phases=[Phase.generate],
                deadline=None,
                suppress_health_check=list(HealthCheck),
            )
            every(seed(number)(given(cases.drawn("conv_bias_act", False, stratum))(each)))()
    assert kernels == set(range(1, strategy.MOST_POOL + 1))
    assert steps == set(range(1, strategy.MOST_POOL_STRIDE + 1))
    assert paddings == {(k, p) for k in kernels for p in range(k // 2 + 1)}
    assert {s.split(", ")[0] for s in wider} == set(strategy.ALGORITHMS)
    assert len(cases.strata("conv_bias_act")) == len(
        list(itertools.product(strategy.ALGORITHMS, strategy.EPILOGUES))
    )
