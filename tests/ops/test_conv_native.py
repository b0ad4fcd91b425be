"""conv_bias_act's CPU kernels past every block, in each ISA, for any threads and drawn shapes."""

import random
import re
import struct

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mbm_kernels
from mbm_kernels._core import cost, native
from mbm_kernels.bench import drawn_times
from mbm_kernels.bench.drawn import draw
from mbm_kernels.ops.conv_bias_act import backend_cpu, dispatch, problem
from mbm_kernels.testing.errors import assert_matches

pytestmark = pytest.mark.skipif(native.cpu_reason() is not None, reason="needs _C_cpu")
CHANNELS_LAST = torch.channels_last

# B, C, K, Y, X, R, options
SHAPES = {
    # More than one block of tiles, channels and panels that end inside a vector, odd sides.
    "winograd": (5, 35, 70, 23, 37, 3, {"padding": 1, "activation": "relu"}),
    "winograd, pool": (4, 20, 40, 30, 31, 3, {"padding": 1, "activation": "relu", "max_pool": 2}),
    "winograd, few tiles": (3, 80, 150, 7, 7, 3, {"padding": 1, "activation": "silu"}),
    "stem": (3, 3, 40, 70, 66, 3, {"padding": 1, "activation": "relu", "max_pool": 2}),
    "strided stem": (2, 3, 40, 61, 64, 7, {"padding": 3, "stride": 2, "max_pool": (3, 2, 1)}),
    "one by one": (2, 70, 90, 12, 11, 1, {"activation": "gelu"}),
    # grad_x by the phases of the stride; some of the last two's meet no tap.
    "strided": (2, 37, 70, 17, 30, 3, {"padding": 1, "stride": 2, "activation": "relu"}),
    "strided, dilated": (2, 20, 24, 19, 22, 4, {"padding": 3, "stride": 4, "dilation": 2}),
    "strided one by one": (2, 36, 40, 10, 33, 1, {"stride": 2, "groups": 2}),
    "groups": (2, 24, 36, 15, 17, 3, {"padding": 1, "groups": 4, "dilation": 2}),
    "stem, no pool": (2, 1, 21, 9, 75, 3, {"padding": 1, "activation": "relu"}),
    "stem, silu": (2, 3, 40, 31, 39, 3, {"padding": 1, "stride": 2, "activation": "silu"}),
    "stem, planes a power of two apart": (1, 4, 40, 16, 32, 3, {"padding": 1}),
    "stem of one vector": (1, 2, 5, 11, 31, 4, {"stride": 3, "dilation": 2, "max_pool": 2}),
    # Several strips of rows, a last vector of channels or pixels; rows shorter than a vector.
    "depthwise strips": (2, 40, 40, 71, 29, 3, {"padding": 1, "groups": 40}),
    "depthwise strips, strided": (1, 53, 53, 21, 33, 7, {"padding": 3, "stride": 2, "groups": 53}),
    "depthwise strips, short": (
        *(3, 21, 21, 9, 5, 5),
        {"padding": 2, "groups": 21, "activation": "hardswish"},
    ),
    "depthwise rows, pool": (2, 33, 33, 13, 8, 5, {"padding": 4, "groups": 33, "max_pool": 2}),
    "depthwise, dilated": (1, 18, 18, 9, 11, 3, {"dilation": 3, "padding": 2, "groups": 18}),
    "depthwise": (2, 37, 37, 19, 35, 5, {"padding": 2, "groups": 37, "activation": "relu6"}),
    # Groups of part of a vector of outputs, of one and a part, of more than a panel.
    "narrow groups": (2, 24, 24, 17, 31, 3, {"padding": 1, "groups": 3, "activation": "relu"}),
    "groups, strided": (1, 39, 33, 15, 9, 5, {"padding": 2, "groups": 3, "stride": 2}),
    "wide groups": (1, 40, 74, 7, 6, 3, {"padding": 1, "groups": 2, "activation": "silu"}),
    # Read in place where channels_last: several blocks of pixels, a rest, part of a panel.
    "one by one, in place": (2, 64, 40, 15, 17, 1, {"activation": "silu"}),
    "one by one, groups": (2, 36, 50, 9, 11, 1, {"groups": 2}),
    # Products over several slices of the taps and channels, rows copied or in place.
    "slices": (2, 83, 70, 9, 15, 3, {"padding": 1, "stride": 2, "activation": "hardswish"}),
    "slices, dilated": (1, 70, 20, 11, 13, 3, {"padding": 2, "dilation": 2, "stride": 2}),
    "slices, in place": (2, 600, 40, 5, 7, 1, {"activation": "relu6"}),
    "one by one, slices": (2, 300, 40, 7, 7, 1, {"activation": "silu"}),
    "small maps": (3, 37, 70, 15, 16, 3, {"padding": 1, "stride": 2, "activation": "leaky_relu"}),
    "small maps, stride 3": (2, 40, 20, 19, 22, 3, {"padding": 2, "stride": 3, "dilation": 2}),
}


def tensors(b, c, k, y, x, r, options, *, layout=CHANNELS_LAST, whole=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    group = c // options.get("groups", 1)

    def leaf(*shape, scale=1.0):
        if whole:
            return torch.randint(-2, 3, shape, generator=generator).float()
        return torch.randn(*shape, generator=generator) * scale

    pixels = leaf(b, c, y, x).contiguous(memory_format=layout).requires_grad_()
    weight = leaf(k, group, r, r, scale=(group * r * r) ** -0.5).requires_grad_()
    return pixels, weight, leaf(k, scale=0.1).requires_grad_()


def run(inputs, options, threads=1, backend="cpu"):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = mbm_kernels.conv_bias_act(*inputs, **options, backend=backend)
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(y.shape, generator=generator).to(y.dtype)
        return y, *torch.autograd.grad(y, inputs, grad)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST])
@pytest.mark.parametrize("name", SHAPES)
def test_same_bits_for_any_thread_count(isa, name, layout):
    *shape, options = SHAPES[name]
    inputs = tensors(*shape, options, layout=layout)
    one = run(inputs, options)
    for threads in (2, 3):
        for expected, actual in zip(one, run(inputs, options, threads), strict=True):
            assert torch.equal(expected, actual)


@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST])
@pytest.mark.parametrize("name", SHAPES)
def test_blocks_agree_with_the_definition(isa, name, layout):
    *shape, options = SHAPES[name]
    inputs = tensors(*shape, options, layout=layout)
    truth = run([t.detach().double().requires_grad_() for t in inputs], options, backend="torch")
    for actual, expected in zip(run(inputs, options), truth, strict=True):
        error = (actual - expected).abs().max() / expected.abs().max()
        # A near tie of a window, decided otherwise than in float64, moves one gradient.
        assert error < backend_cpu.WINOGRAD_ERROR


def block_of(inputs, options, residual=None):
    """What the kernels are told of a call."""
    window = options.get("max_pool")
    edges = (options.get("padding", 0),) * 4
    pair = [(options.get(name, 1),) * 2 for name in ("stride", "dilation")]
    found = problem.find(
        *inputs,
        residual,
        pair[0],
        edges,
        pair[1],
        options.get("groups", 1),
        options.get("activation"),
        None if window is None else (window, window, window, window, 0, 0),
    )
    return backend_cpu._native(found).block


@pytest.mark.parametrize(
    ("name", "nchw", "channels_last"),
    [
        ("winograd", "winograd", "winograd"),
        ("depthwise", "depthwise", "depthwise"),
        ("depthwise strips", "depthwise", "depthwise"),
        ("stem, no pool", "few", "few"),
        ("stem, silu", "few", "few"),
        ("one by one", "planes", "pixels"),
        ("strided one by one", "planes", "pixels"),
        ("small maps", "planes", "pixels"),
        ("strided", "direct", "pixels"),
        ("groups", "direct", "direct"),
        ("winograd, pool", "winograd", "winograd"),
    ],
)
def test_layouts_have_kernels_of_their_own(name, nchw, channels_last):
    *shape, options = SHAPES[name]
    for layout, expected in ((torch.contiguous_format, nchw), (CHANNELS_LAST, channels_last)):
        block = block_of(tensors(*shape, options, layout=layout), options)
        assert native.cpu().conv_kernel(block) == expected


def test_the_model_of_cost_names_the_kernel_that_runs(monkeypatch):
    plans, rng = [], random.Random(3)
    of = backend_cpu._native
    monkeypatch.setattr(backend_cpu, "_native", lambda p: plans.append(of(p)) or plans[-1])
    machine = {**cost.machine_sizes(), "threads": 1}
    for _ in range(60):
        drawing = draw("conv_bias_act", rng, False)
        sizes = drawn_times.sizes_of("conv_bias_act", drawing.call()("cpu"))
        runs = native.cpu().conv_kernel(plans[-1].block)
        assert dispatch.forward_kernel({**sizes, **machine}) == runs, drawing.label


def test_large_images_agree_with_strips(isa):
    options = {"padding": 1, "groups": 48, "activation": "silu"}
    x, weight, bias = (t.detach() for t in tensors(1, 48, 48, 93, 90, 3, options))
    read_in_order = mbm_kernels.conv_bias_act(x, weight, bias, **options, backend="cpu")
    by_strips = mbm_kernels.conv_bias_act(x.contiguous(), weight, bias, **options, backend="cpu")
    torch.testing.assert_close(read_in_order, by_strips, rtol=1e-5, atol=1e-5)


def test_a_weight_in_the_wrong_form_is_refused():
    for layout, plain in ((torch.contiguous_format, False), (CHANNELS_LAST, True)):
        x, weight, bias = tensors(1, 20, 20, 5, 5, 1, {}, layout=layout)
        block = block_of((x, weight, bias), {})
        form = (0, weight.data_ptr()) if plain else (weight.data_ptr(), 0)
        inputs = (x.data_ptr(), *form, bias.data_ptr(), 0)
        y = torch.empty(1, 20, 5, 5)
        with pytest.raises(ValueError, match="expected the other form"):
            native.cpu().conv_forward(block, inputs, (y.data_ptr(), 0, 0), 1)


@pytest.mark.parametrize("channels", [16, 64, 512])
def test_winograds_error_is_within_its_constant(isa, channels):
    options = {"padding": 1}
    inputs = tensors(2, channels, 32, 10, 10, 3, options)
    truth = run([t.detach().double().requires_grad_() for t in inputs], options, backend="torch")
    errors = [
        float((actual - expected).detach().abs().max() / expected.detach().abs().max())
        for actual, expected in zip(run(inputs, options), truth, strict=True)
    ]
    assert max(errors) < backend_cpu.WINOGRAD_ERROR


# B, C, K, Y, X, R, options: sums of 576 terms and more, by kernels that keep them in registers.
LONG_SUMS = {
    "groups": (1, 128, 128, 14, 14, 3, {"padding": 1, "groups": 2}),
    "groups, many taps": (1, 128, 128, 12, 12, 6, {"groups": 2}),
    "wide groups": (1, 256, 64, 14, 14, 3, {"padding": 1, "groups": 2}),
    "dilated": (1, 512, 32, 14, 14, 3, {"padding": 2, "dilation": 2}),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST])
@pytest.mark.parametrize("name", LONG_SUMS)
def test_long_sums_of_one_sign_keep_the_error_rule(isa, name, layout):
    *shape, options = LONG_SUMS[name]
    inputs = [t.detach().abs().requires_grad_() for t in tensors(*shape, options, layout=layout)]
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    truth = run(doubles, options, backend="torch")[0]
    stock, ours = (run(inputs, options, backend=name)[0] for name in ("torch", "cpu"))
    assert_matches(ours, truth, stock, truth)


@pytest.mark.parametrize("name", SHAPES)
def test_whole_numbers_are_exact_without_winograd(isa, name, monkeypatch):
    monkeypatch.setenv("MBM_WINOGRAD", "0")
    *shape, options = SHAPES[name]
    options = {n: v for n, v in options.items() if n != "activation"} | {"activation": "relu"}
    inputs = tensors(*shape, options, whole=True)
    outputs = []
    for backend in ("cpu", "torch"):
        y = mbm_kernels.conv_bias_act(*inputs, **options, backend=backend)
        grad = (torch.arange(y.numel()) % 5 - 2).float().view(y.shape)
        outputs.append((y, *torch.autograd.grad(y, inputs, grad)))
    for actual, expected in zip(*outputs, strict=True):
        assert torch.equal(actual, expected)


def test_winograd_can_be_turned_off(monkeypatch):
    inputs = tensors(1, 32, 32, 12, 12, 3, {}, whole=True)
    exact = F.conv2d(*inputs, padding=1)
    assert not torch.equal(mbm_kernels.conv_bias_act(*inputs, padding=1, backend="cpu"), exact), (
        "Winograd's thirds are not exact"
    )
    monkeypatch.setenv("MBM_WINOGRAD", "0")
    assert torch.equal(mbm_kernels.conv_bias_act(*inputs, padding=1, backend="cpu"), exact)


@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST])
def test_kernels_transformed_as_they_are_used_give_the_same_bits(isa, layout, monkeypatch):
    *shape, options = SHAPES["winograd, few tiles"]
    x, weight, bias = tensors(*shape, options)
    weight = weight.detach().contiguous(memory_format=layout).requires_grad_()
    assert backend_cpu._fresh(3, (7, 7), 80)
    fresh = run((x, weight, bias), options)
    monkeypatch.setattr(backend_cpu, "_fresh", lambda *sizes: False)
    problem.PROBLEMS.clear()
    for expected, actual in zip(run((x, weight, bias), options), fresh, strict=True):
        assert torch.equal(expected, actual)
    problem.PROBLEMS.clear()  # their problems have been made without kernels that are transformed


def test_a_changed_weight_is_packed_again():
    x, weight, bias = (t.detach() for t in tensors(1, 16, 16, 9, 9, 3, {}))
    first = mbm_kernels.conv_bias_act(x, weight, bias, padding=1, backend="cpu")
    weight.mul_(2)
    second = mbm_kernels.conv_bias_act(x, weight, padding=1, backend="cpu")
    torch.testing.assert_close(second, 2 * (first - bias[:, None, None]), rtol=1e-4, atol=1e-5)


def test_infinities_spread_no_further_than_their_tiles():
    x, weight, bias = (t.detach() for t in tensors(1, 16, 16, 16, 16, 3, {}))
    x[0, 3, 9, 9] = float("inf")
    y = mbm_kernels.conv_bias_act(x, weight, bias, padding=1, backend="cpu")
    stock = F.conv2d(x, weight, bias, padding=1)
    assert not y[~stock.isfinite()].isfinite().any()
    clean = mbm_kernels.conv_bias_act(
        x.nan_to_num(posinf=0), weight, bias, padding=1, backend="cpu"
    )
    assert torch.equal(y[..., :8, :8], clean[..., :8, :8])


@st.composite
def drawn(draw):
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    large = draw(st.booleans())
    channels = groups * draw(st.integers(17, 40) if large else st.integers(1, 8))
    outputs = groups * draw(st.integers(33, 70) if large else st.integers(1, 8))
    kernel = draw(st.sampled_from([3, 3, 1, 2, 5]))
    options = {
        "groups": groups,
        "stride": draw(st.sampled_from([1, 1, 1, 2, 3])),
        "padding": draw(st.integers(0, 2)),
        "dilation": draw(st.sampled_from([1, 1, 2])),
        "activation": draw(st.sampled_from([None, "relu", "leaky_relu", "silu"])),
    }
    least = options["dilation"] * (kernel - 1) + 1
    side = st.integers(max(least, 15), 30) if large else st.integers(least, 12)
    height, width = draw(side), draw(side)
    smallest = min(height, width) + 2 * options["padding"] - least
    if smallest // options["stride"] + 1 >= 3:
        options["max_pool"] = draw(st.sampled_from([None, 2, (3, 2, 1), (3, 1, 0)]))
    layout = draw(st.sampled_from([torch.contiguous_format, CHANNELS_LAST]))
    return (draw(st.integers(1, 3)), channels, outputs, height, width, kernel, options), layout


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(drawn())
def test_drawn_shapes_agree_with_the_definition(case):
    (*shape, options), layout = case
    inputs = tensors(*shape, options, layout=layout)
    y = mbm_kernels.conv_bias_act(*inputs, **options, backend="cpu")
    wide = [t.detach().double().requires_grad_() for t in inputs]
    truth = mbm_kernels.conv_bias_act(*wide, **options, backend="torch")
    for form in (torch.contiguous_format, CHANNELS_LAST):
        assert y.is_contiguous(memory_format=form) == truth.is_contiguous(memory_format=form)
    largest = max(1.0, float(truth.detach().abs().max()))
    assert float((y - truth).detach().abs().max()) < backend_cpu.WINOGRAD_ERROR * largest
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    actual = torch.autograd.grad(y, inputs, grad)
    for a, e in zip(actual, torch.autograd.grad(truth, wide, grad.double()), strict=True):
        # The bound of a result, over the sums of absolute values that gradients can have.
        assert float((a - e).abs().max()) < 2e-5 * max(1.0, float(e.abs().max()))


@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST])
@pytest.mark.parametrize("max_pool", [None, 2, (3, 2, 1)])
def test_a_nan_reaches_the_stems_outputs_that_stock_gives_it(isa, layout, max_pool):
    options = {"padding": 1, "activation": "relu", "max_pool": max_pool}
    x, weight, bias = tensors(2, 3, 40, 18, 26, 3, options, layout=layout)
    with torch.no_grad():
        for at, value in ((3, "nan"), (12, "nan"), (20, "inf"), (25, "-inf")):
            x[1, 1, 7, at] = float(value)
        actual = mbm_kernels.conv_bias_act(x, weight, bias, **options, backend="cpu")
        expected = F.relu(F.conv2d(x, weight, bias, padding=1))
        if max_pool:
            expected = F.max_pool2d(expected, *([2] if max_pool == 2 else max_pool))
    torch.testing.assert_close(actual, expected, equal_nan=True)
    assert actual.isnan().any()
    assert actual.isinf().any()


def test_maps_past_the_cache_have_the_bits_of_small_ones(isa):
    options = {"padding": 1, "groups": 128}
    x, weight, bias = tensors(9, 128, 128, 62, 62, 3, options)
    with torch.no_grad():
        whole = mbm_kernels.conv_bias_act(x, weight, bias, **options, backend="cpu")
        one = mbm_kernels.conv_bias_act(x[8:], weight, bias, **options, backend="cpu")
    assert torch.equal(whole[8:], one)


class TestProblemBlock:
    """The native argument block is filled by name and refused where it is not one."""

    def test_native_calls_take_few_arguments(self):
        module = native.cpu()
        names = [name for name in dir(module) if name.startswith("conv_")]
        assert {"conv_forward", "conv_backward", "conv_pack"} <= set(names)
        for name in names:
            assert len(re.findall(r"arg\d+:", getattr(module, name).__doc__)) <= 8, name

    @pytest.mark.parametrize("block", [b"", bytes(8), bytes(8 * 1000)])
    def test_a_block_of_another_size_is_refused(self, block):
        with pytest.raises(ValueError, match=f"problem: got {len(block)} bytes; expected"):
            native.cpu().conv_forward(block, (0,) * 5, (0,) * 3, 1)
        with pytest.raises(ValueError, match="fill it by conv_problem_fields"):
            native.cpu().conv_backward(block, (0,) * 5, (0,) * 5, (0,) * 4, 1)

    def test_null_addresses_and_absurd_steps_are_refused(self):
        fields = native.cpu().conv_problem_fields()
        good = dict.fromkeys(fields, 1) | {"top": 0, "left": 0, "pool_top": 0, "pool_left": 0}

        def forward(**changed):
            values = good | changed
            block = struct.pack(f"{len(fields)}q", *(values[name] for name in fields))
            native.cpu().conv_forward(block, (0,) * 5, (0,) * 3, 1)

        for name in ("x", "y", "weight"):
            given = {"x": (0, 0, 64, 0, 0), "y": (64, 0, 64, 0, 0), "weight": (64, 0, 0, 0, 0)}[
                name
            ]
            block = struct.pack(f"{len(fields)}q", *(good[n] for n in fields))
            with pytest.raises(ValueError, match=f"{name}: got a null address"):
                native.cpu().conv_forward(block, given, (0 if name == "y" else 64, 0, 0), 1)
        for changed in ({"stride_y": 0}, {"dilation_x": 2**33}, {"top": -1}, {"pool_left": -1}):
            with pytest.raises(ValueError, match="got a stride, dilation, padding or window of"):
                forward(**changed)
        with pytest.raises(ValueError, match="got activation 10"):
            forward(activation=10)
