"""conv_bias_act against convolution, activation and pooling, NCHW and channels_last."""

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F

from mbm_kernels.bench import (
    FORWARD,
    Benchmark,
    Case,
    Form,
    Work,
    eager_and_compiled,
    frozen,
    holding,
    with_channels_last,
)
from mbm_kernels.bench.cli import run_script
from mbm_kernels.models.captioner_config import SIZES
from mbm_kernels.ops.conv_bias_act import backend_cuda, geometry, problem
from mbm_kernels.ops.conv_bias_act.backend_cpu import WINOGRAD_ERROR


def make(case, generator):
    b, c, k, y, kernel = (case.sizes[letter] for letter in ("B", "C", "K", "Y", "k"))
    options = dict(case.options)
    fan_in = c // options.get("groups", 1) * kernel**2
    inputs = {
        "x": torch.randn(b, c, y, y, generator=generator),
        "weight": torch.randn(k, fan_in // kernel**2, kernel, kernel, generator=generator)
        * fan_in**-0.5,
        "bias": torch.randn(k, generator=generator) * 0.1,
    }
    if options.pop("residual", False):
        inputs["residual"] = torch.randn(b, k, y, y, generator=generator)
    # The layout in which stock is fastest, and the captioner's, unless the case says otherwise.
    if not options.pop("nchw", False):
        for name in inputs.keys() - {"bias"}:
            inputs[name] = inputs[name].contiguous(memory_format=torch.channels_last)
    return {**inputs, "padding": kernel // 2, **options}


def layers(
    x, weight, bias, padding, stride=1, groups=1, residual=None, activation=None, max_pool=None
):
    y = F.conv2d(x, weight, bias, stride, padding, 1, groups)
    if residual is not None:
        y = y.add_(residual)  # a convolution's result is not saved for the backward pass
    # relu commutes with the maximum and has fewer elements left after it.
    if max_pool is not None:
        kernel, step, pad = max_pool if isinstance(max_pool, tuple) else (max_pool, max_pool, 0)
        y = F.max_pool2d(y, kernel, step, pad)
    return F.relu(y, inplace=True) if activation == "relu" else y


def through_channels_last(x, **rest):
    return layers(x.contiguous(memory_format=torch.channels_last), **rest).contiguous()


def build(inputs):
    return layers, inputs


def build_through(inputs):
    """The weights are laid out once, as a model's are, the images in each call."""
    weight = inputs["weight"]
    weight.data = weight.detach().contiguous(memory_format=torch.channels_last)
    return through_channels_last, inputs


def stock(case):
    """Of NCHW cases, forms that take NCHW and return it."""
    held = holding(layers, ("weight", "bias"))
    if not case.options.get("nchw"):
        return with_channels_last(build) | frozen(held, torch.channels_last)
    return {
        **eager_and_compiled(build),
        **frozen(held),
        "eager through channels_last": Form(build_through),
    }


def work(case, which):
    b, c, k, y, kernel = (case.sizes[letter] for letter in ("B", "C", "K", "Y", "k"))
    out = y // case.options.get("stride", 1)
    fan_in = c // case.options.get("groups", 1) * kernel**2
    pool = case.options.get("max_pool") or 1
    pool = pool[1] if isinstance(pool, tuple) else pool
    operations = 2 * b * k * out**2 * fan_in
    # Winograd's F(4x4, 3x3) takes 36 products where 144 are written.
    winograd = kernel == 3 and out == y and case.options.get("groups", 1) == 1
    fewest = operations / 4 if winograd else operations
    floats = b * c * y**2 + k * fan_in + b * k * (out // pool) ** 2
    passes = 1 if which == FORWARD else 3
    return Work(passes * operations, passes * 4 * floats, fewest=passes * fewest)


def sizes(b, c, k, y, kernel):
    return {"B": b, "C": c, "K": k, "Y": y, "k": kernel}


def takes(case, backend):
    if backend != "cuda":
        return True
    tiny = Case({**case.sizes, "B": 1}, case.options)
    inputs = make(tiny, torch.Generator().manual_seed(0))
    names = ("x", "weight", "bias", "residual")
    options = {name: value for name, value in inputs.items() if name not in names}
    window = geometry.pool_window(BENCHMARK.op, options.pop("max_pool", None))
    steps = (options.pop("stride", 1),) * 2
    found = problem.build(
        *(inputs.get(name) for name in names),
        steps,
        (options["padding"],) * 4,
        (1, 1),
        options.get("groups", 1),
        options.get("activation"),
        window,
    )
    return backend_cuda.why_not_sizes(found.sizes) is None


def checked(side, rows):
    """Fewer rows forward; for gradients few windows too, or every draw has a near tie."""
    return {"check": {"B": rows}, "check_gradients": {"B": 1, "Y": min(side, 14)}}


def body(channels, side):
    """A 3x3 layer of a residual network's body, alone and pooled."""
    shape = sizes(16, channels, channels, side, 3)
    return [
        Case(shape, {"activation": "relu"}, "relu", **checked(side, 2)),
        Case(shape, POOLED, "relu pool2", **checked(side, 2)),
    ]


def others():
    """Bottleneck's 1x1 layers, a strided 3x3 and a 5x5."""
    for c, k in ((64, 64), (256, 64), (64, 256)):
        yield Case(sizes(16, c, k, 56, 1), {"activation": "relu"}, "relu", **checked(56, 2))
    strided = {"activation": "relu", "stride": 2}
    yield Case(sizes(16, 128, 256, 28, 3), strided, "stride2 relu", **checked(28, 2))
    yield Case(sizes(16, 32, 64, 28, 5), {"activation": "relu"}, "relu", **checked(28, 2))


def captioner(size):
    """The encoder's three pooled layers on 64x64 images, then its residual one."""
    widths = (3, *SIZES[size].channels)
    for i, (c, k) in enumerate(itertools.pairwise(widths)):
        quick = size == "student" and i == 0
        note = f"{size} {i + 1}, relu pool2"
        yield Case(sizes(32, c, k, 64 >> i, 3), POOLED, note, quick=quick, **checked(64 >> i, 4))
    shape = sizes(32, widths[-1], widths[-1], 8, 3)
    yield Case(shape, RESIDUAL, f"{size} residual", **checked(8, 4))


POOLED = {"activation": "relu", "max_pool": 2}
STRIDED = {"activation": "relu", "stride": 2, "max_pool": (3, 2, 1)}
RESIDUAL = {"activation": "relu", "residual": True}

BENCHMARK = Benchmark(
    op="conv_bias_act",
    extra=WINOGRAD_ERROR,
    cases=[
        Case(sizes(8, 3, 64, 224, 3), POOLED, "relu pool2", **checked(224, 1)),
        Case(sizes(8, 3, 64, 224, 7), STRIDED, "stride2 relu pool3/2", **checked(224, 1)),
        *body(64, 56),
        *body(128, 28),
        *body(256, 14),
        *body(512, 7),
        Case(sizes(16, 128, 128, 56, 3), {"groups": 128}, "depthwise", check={"B": 1}),
        Case(sizes(16, 128, 128, 56, 7), {"groups": 128}, "depthwise", check={"B": 1}),
        Case(sizes(16, 384, 384, 14, 7), {"groups": 384}, "depthwise", check={"B": 1}),
        Case(
            sizes(16, 64, 64, 56, 3), {**POOLED, "nchw": True}, "relu pool2 NCHW", **checked(56, 2)
        ),
        Case(
            sizes(16, 128, 128, 56, 7),
            {"groups": 128, "nchw": True},
            "depthwise NCHW",
            check={"B": 1},
        ),
        *others(),
        *(case for size in SIZES for case in captioner(size)),
    ],
    gpu_cases=[
        Case(sizes(64, 3, 64, 224, 3), POOLED, "relu pool2", quick=True, **checked(224, 1)),
        Case(sizes(32, 64, 64, 56, 3), POOLED, "relu pool2", quick=True, **checked(56, 2)),
        Case(sizes(64, 3, 64, 224, 7), STRIDED, "stride2 relu pool3/2", **checked(224, 1)),
        Case(sizes(32, 256, 256, 14, 3), POOLED, "relu pool2", **checked(14, 2)),
        Case(sizes(32, 128, 128, 56, 7), {"groups": 128}, "depthwise", check={"B": 1}),
    ],
    make=make,
    stock=stock,
    work=work,
    engine=lambda case: holding(layers, ("weight", "bias")),
    kinks=True,
    takes=takes,
)

if __name__ == "__main__":
    run_script(BENCHMARK, Path(__file__).resolve().parent)
