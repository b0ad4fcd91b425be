"""Problems drawn at random for every operation: what cost models are fitted to and judged by.

Sizes are log-uniform, so that none stands on a benchmark's grid; options, layouts, and training or
inference are drawn too. The same seed draws the same problems.
"""

import importlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST_PRODUCTS = 1e9  # multiply-adds of a pass: 25 ms on two cores
LEAST_PRODUCTS = 1e4  # below, a call's arithmetic is nothing beside the call
MOST_ELEMENTS = 8e6  # of what a pass reads and writes: 32 MB

Make = Callable[[torch.Generator], tuple[list[Any], dict[str, Any], list[Tensor]]]


@dataclass(frozen=True)
class Drawn:
    """One call of an operation: `make` gives its arguments, options and differentiable leaves."""

    op: str
    label: str
    training: bool
    products: float
    make: Make
    elements: float = 0.0

    def call(self, seed: int = 0) -> Callable[[str], Callable[[], object]]:
        """A function that gives, for a backend, the timed call; all backends share the inputs."""
        generator = torch.Generator().manual_seed(seed)
        args, options, leaves = self.make(generator)
        function = getattr(importlib.import_module(f"mbm_kernels.ops.{self.op}"), self.op)
        if not self.training:

            def of(backend: str) -> Callable[[], object]:
                def call() -> object:
                    with torch.no_grad():
                        return function(*args, **options, backend=backend)

                return call

            return of
        for leaf in leaves:
            leaf.requires_grad_()
        numbers = [leaf.detach().as_strided((1,), (1,)) for leaf in leaves]
        # Attention weights and final states are seldom trained through: the first result alone is.
        sample = first(function(*args, **options, backend="torch"))
        grad = torch.randn(sample.shape, generator=generator)
        if sample.dim() == 4 and sample.is_contiguous(memory_format=torch.channels_last):
            grad = grad.contiguous(memory_format=torch.channels_last)

        def in_training(backend: str) -> Callable[[], object]:
            def call() -> object:
                # A step of training changes the weights: what was packed of them is redone.
                for number in numbers:
                    number.neg_()
                found = first(function(*args, **options, backend=backend))
                return torch.autograd.grad(found, leaves, grad)

            return call

        return in_training


def first(outputs: Any) -> Tensor:
    found: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
    return found


def size(rng: random.Random, least: float, most: float) -> int:
    """A log-uniform integer between the two."""
    return round(math.exp(rng.uniform(math.log(least), math.log(most))))


def _normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=generator) * scale


CONVOLUTIONS = (
    *("3x3", "1x1", "stem") * 3,
    *("depthwise", "grouped") * 2,
    *("3x3", "1x1", "large", "long"),
)


def _conv(rng: random.Random, training: bool) -> Drawn:
    """The kind is drawn first: that the others are longer makes no kind rarer."""
    kind = rng.choice(CONVOLUTIONS)
    while True:
        found = _conv_of(kind, rng, training)
        if _fits(found):
            return found


def _conv_of(kind: str, rng: random.Random, training: bool) -> Drawn:
    b, side = size(rng, 1, 32), size(rng, 6, 160)
    other = side if rng.random() < 0.7 else size(rng, 6, 160)
    c, k, groups, stride = size(rng, 8, 900), size(rng, 8, 900), 1, (1, 1)
    kernel = {"3x3": (3, 3), "1x1": (1, 1)}.get(kind, (3, 3))
    if kind == "depthwise":
        kernel = (rng.choice([3, 3, 5, 7]),) * 2
        c = k = groups = size(rng, 16, 1200)
    elif kind == "grouped":
        groups = size(rng, 2, 32)
        c, k = groups * size(rng, 4, 48), groups * size(rng, 4, 48)
        kernel = rng.choice([(3, 3), (1, 1)])
    elif kind == "stem":
        c, k = rng.choice([1, 3, 3, 4]), size(rng, 8, 96)
        kernel = (rng.choice([3, 3, 5, 7]),) * 2
        side, other = size(rng, 24, 256), size(rng, 24, 256)
    elif kind == "large":
        kernel = rng.choice([(5, 5), (7, 7), (1, 5), (9, 1), (1, 3), (11, 5)])
    elif kind == "long":  # of speech: a spectrogram or its features
        c, k, kernel = size(rng, 1, 128), size(rng, 8, 128), (size(rng, 1, 45), size(rng, 1, 15))
        if rng.random() < 0.5:  # a front end's first layers are long both ways
            kernel = (size(rng, 9, 45), size(rng, 7, 15))
        # With AVX-512 oneDNN's gradient of a weight longer than the image writes past its memory.
        side, other = max(side, kernel[0]), max(other, kernel[1])
    if rng.random() < {"stem": 0.6, "1x1": 0.15, "long": 0.5}.get(kind, 0.25):
        stride = (2, 1) if kind == "long" and rng.random() < 0.5 else (2, 2)
    padding = tuple(n // 2 for n in kernel)
    out = [
        (n + 2 * p - m) // s + 1
        for n, p, m, s in zip((side, other), padding, kernel, stride, strict=True)
    ]
    activation = rng.choice([None, None, "relu", "relu", "relu", "silu", "hardswish", "gelu"])
    pool: Any = None
    if kind in ("3x3", "stem", "large") and min(out) >= 4 and rng.random() < 0.3:
        pool = rng.choice([2, (3, 2, 1)])
    last, bias = rng.random() < 0.6, rng.random() < 0.7
    residual = pool is None and stride == (1, 1) and c == k and rng.random() < 0.3

    def make(generator: torch.Generator) -> tuple[list[Any], dict[str, Any], list[Tensor]]:
        layout = torch.channels_last if last else torch.contiguous_format
        x = _normal(generator, b, c, side, other).contiguous(memory_format=layout)
        w = _normal(generator, k, c // groups, *kernel, scale=0.05)
        w = w.contiguous(memory_format=layout)
        options: dict[str, Any] = {
            "stride": stride,
            "padding": padding,
            "groups": groups,
            "activation": activation,
            "max_pool": pool,
        }
        if residual:
            options["residual"] = _normal(generator, b, k, *out).contiguous(memory_format=layout)
        leaves = [w] if kind == "stem" else [x, w]
        args = [x, w]
        if bias:
            args.append(_normal(generator, k))
            leaves.append(args[2])
        return args, options, leaves

    layout = "channels_last" if last else "NCHW"
    spans, steps = (f"{pair[0]}x{pair[1]}" for pair in (kernel, stride))
    label = f"{kind} B{b} {c}->{k} {side}x{other} k{spans} s{steps} g{groups}"
    label += f" {activation or 'linear'} pool {pool} {layout}{' residual' * residual}"
    products = b * k * (c // groups) * math.prod(kernel) * math.prod(out)
    elements = b * (c * side * other + k * math.prod(out))
    return Drawn("conv_bias_act", label, training, (1 + 2 * training) * products, make, elements)


def _additive(rng: random.Random, training: bool) -> Drawn:
    b, t, s, d = size(rng, 1, 64), size(rng, 1, 40), size(rng, 4, 300), size(rng, 16, 700)
    e = d if rng.random() < 0.5 else size(rng, 16, 700)

    def make(generator: torch.Generator) -> Any:
        shapes = ((b, t, d), (b, s, d), (b, s, e), (d,))
        args = [_normal(generator, *shape) for shape in shapes]
        args[3] /= math.sqrt(d)
        return args, {}, list(args)

    label = f"B{b} T{t} S{s} D{d} E{e}"
    return Drawn("additive_attention", label, training, 20.0 * b * t * s * d, make)


def _gru(rng: random.Random, training: bool) -> Drawn:
    b, t, c, h = size(rng, 1, 64), size(rng, 1, 100), size(rng, 8, 800), size(rng, 16, 1024)
    t = 1 if rng.random() < 0.2 else t  # streaming
    ragged = rng.random() < 0.25

    def make(generator: torch.Generator) -> Any:
        scale = 1 / math.sqrt(h)
        args = [_normal(generator, t, b, c), _normal(generator, b, h)]
        args += [_normal(generator, 3 * h, n, scale=scale) for n in (c, h)]
        args += [_normal(generator, 3 * h, scale=scale) for _ in range(2)]
        options = {}
        if ragged:
            options["lengths"] = torch.randint(1, t + 1, (b,), generator=generator)
        return args, options, list(args)

    products = (1 + 2 * training) * 3.0 * b * t * h * (c + h)
    return Drawn("gru", f"T{t} B{b} C{c} H{h}{' ragged' * ragged}", training, products, make)


def _gru_cell(rng: random.Random, training: bool) -> Drawn:
    b, c, h = size(rng, 1, 320), size(rng, 8, 800), size(rng, 16, 1024)

    def make(generator: torch.Generator) -> Any:
        scale = 1 / math.sqrt(h)
        args = [_normal(generator, b, c), _normal(generator, b, h)]
        args += [_normal(generator, 3 * h, n, scale=scale) for n in (c, h)]
        args += [_normal(generator, 3 * h, scale=scale) for _ in range(2)]
        return args, {}, list(args)

    products = (1 + 2 * training) * 3.0 * b * h * (c + h)
    return Drawn("gru_cell", f"B{b} C{c} H{h}", training, products, make)


def _cross(rng: random.Random, training: bool) -> Drawn:
    b, n, t, s = size(rng, 1, 32), size(rng, 1, 12), size(rng, 1, 160), size(rng, 8, 400)
    d = rng.choice([16, 24, 32, 40, 48, 64, 80, 96, 128])
    need = rng.choice([None, None, "mean", "heads"])
    ragged = rng.random() < 0.25

    def make(generator: torch.Generator) -> Any:
        args = [_normal(generator, b, n, m, d) for m in (t, s, s)]
        options: dict[str, Any] = {"need_weights": need}
        if ragged:
            options["key_lengths"] = torch.randint(1, s + 1, (b,), generator=generator)
        return args, options, list(args)

    label = f"B{b} N{n} T{t} S{s} D{d} weights {need}{' ragged' * ragged}"
    products = (2 + 5 * training) * 1.0 * b * n * t * s * d
    return Drawn("cross_attention", label, training, products, make)


def _concat(rng: random.Random, training: bool) -> Drawn:
    b, t, parts = size(rng, 1, 64), size(rng, 1, 128), rng.choice([1, 2, 2, 3, 4])
    widths = [size(rng, 8, 700) for _ in range(parts)]
    shared, k = rng.random() < 0.5, size(rng, 16, 1000)

    def make(generator: torch.Generator) -> Any:
        inputs = [
            _normal(generator, b, 1 if shared and i == 0 and parts > 1 else t, c)
            for i, c in enumerate(widths)
        ]
        weight = _normal(generator, k, sum(widths), scale=0.05)
        bias = _normal(generator, k)
        return [inputs, weight, bias], {}, [*inputs, weight, bias]

    products = (1 + 2 * training) * 1.0 * b * t * sum(widths) * k
    label = f"B{b} T{t} {'+'.join(map(str, widths))}->{k}{' shared' * shared}"
    return Drawn("concat_linear", label, training, products, make)


def _topk(rng: random.Random, training: bool) -> Drawn:
    r, h, v, k = size(rng, 1, 320), size(rng, 32, 800), size(rng, 100, 20000), size(rng, 1, 8)

    def make(generator: torch.Generator) -> Any:
        args = [_normal(generator, r, h), _normal(generator, v, h, scale=0.05)]
        return [*args, _normal(generator, v), k], {}, []

    return Drawn("linear_topk", f"R{r} H{h} V{v} k{k}", False, 1.0 * r * h * v, make)


def _target(generator: torch.Generator, n: int, v: int, ignored: bool) -> Tensor:
    target = torch.randint(0, v, (n,), generator=generator)
    if ignored:
        target[torch.rand(n, generator=generator) < 0.4] = -100
    return target


def _cross_entropy(rng: random.Random, training: bool) -> Drawn:
    n, h, v = size(rng, 2, 1280), size(rng, 16, 800), size(rng, 10, 16000)
    ignored = rng.random() < 0.3

    def make(generator: torch.Generator) -> Any:
        hidden, weight = _normal(generator, n, h), _normal(generator, v, h, scale=0.05)
        bias = _normal(generator, v)
        args = [hidden, weight, _target(generator, n, v, ignored)]
        return args, {"bias": bias}, [hidden, weight, bias]

    products = (1 + 2 * training) * 1.0 * n * h * v
    label = f"N{n} H{h} V{v}{' ignored' * ignored}"
    return Drawn("linear_cross_entropy", label, training, products, make)


def _distillation(rng: random.Random, training: bool) -> Drawn:
    n, v = size(rng, 2, 1280), size(rng, 10, 16000)
    hs, ht, ignored = size(rng, 16, 600), size(rng, 32, 1100), rng.random() < 0.3
    teacher = rng.choice(["hidden", "logits", "topk"])
    k = min(v, size(rng, 4, 128))
    divergence = rng.choice([*["forward_kl"] * 4, "reverse_kl", "jsd"])

    def make(generator: torch.Generator) -> Any:
        hidden, weight = _normal(generator, n, hs), _normal(generator, v, hs, scale=0.05)
        bias = _normal(generator, v)
        options = {"student_bias": bias, "temperature": 2.0, "divergence": divergence}
        if teacher == "hidden":
            options["teacher_hidden"] = _normal(generator, n, ht)
            options["teacher_weight"] = _normal(generator, v, ht, scale=0.05)
            options["teacher_bias"] = _normal(generator, v)
        else:
            logits = _normal(generator, n, v)
            if teacher == "logits":
                options["teacher_logits"] = logits
            else:
                best = logits.log_softmax(-1).topk(k)
                options["teacher_topk"] = (best.indices, best.values)
        args = [hidden, weight, _target(generator, n, v, ignored)]
        return args, options, [hidden, weight, bias]

    widths = (1 + 2 * training) * hs + (ht if teacher == "hidden" else 0)
    kind = {"hidden": f"Ht{ht}", "logits": "logits", "topk": f"top {k}"}[teacher]
    label = f"N{n} Hs{hs} V{v} {kind} {divergence}{' ignored' * ignored}"
    return Drawn("linear_distillation_loss", label, training, 1.0 * n * v * widths, make)


def _contrastive(rng: random.Random, training: bool) -> Drawn:
    b, d, kind = size(rng, 4, 2048), size(rng, 16, 800), rng.choice(["infonce", "siglip"])

    def make(generator: torch.Generator) -> Any:
        sides = [torch.nn.functional.normalize(_normal(generator, b, d), dim=-1) for _ in "it"]
        scale = torch.tensor(10.0)
        options: dict[str, Any] = {"kind": kind}
        leaves = [*sides, scale]
        if kind == "siglip":
            options["bias"] = torch.tensor(-10.0)
            leaves.append(options["bias"])
        return [*sides, scale], options, leaves

    products = (1 + 2 * training) * 1.0 * b * b * d
    return Drawn("contrastive_loss", f"B{b} D{d} {kind}", training, products, make)


DRAWS: dict[str, Callable[[random.Random, bool], Drawn]] = {
    "conv_bias_act": _conv,
    "gru": _gru,
    "gru_cell": _gru_cell,
    "additive_attention": _additive,
    "cross_attention": _cross,
    "concat_linear": _concat,
    "linear_topk": _topk,
    "linear_cross_entropy": _cross_entropy,
    "linear_distillation_loss": _distillation,
    "contrastive_loss": _contrastive,
}


def draw(op: str, rng: random.Random, training: bool) -> Drawn:
    """A problem of `op` that is neither empty nor longer than the others together."""
    while True:
        found = DRAWS[op](rng, training)
        if _fits(found):
            return found


def _fits(problem: Drawn) -> bool:
    return LEAST_PRODUCTS <= problem.products <= MOST_PRODUCTS and problem.elements <= MOST_ELEMENTS
