"""concat_linear against a linear layer over the concatenation, and against split products."""

from pathlib import Path

import torch
import torch.nn.functional as F

from mbm_kernels.bench import FORWARD, Benchmark, Case, Work, as_called, eager_and_compiled
from mbm_kernels.bench.cli import run_script


def make(case, generator):
    b, t, c, k = (case.sizes[letter] for letter in "BTCK")

    def randn(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator) * scale

    shared = 1 if case.options.get("shared") else t
    return {
        "inputs": [randn(b, shared, c), randn(b, t, c)],
        "weight": randn(k, 2 * c, scale=(2 * c) ** -0.5),
        "bias": randn(k, scale=0.1),
    }


def concatenated(inputs, weight, bias):
    leading = torch.broadcast_shapes(*(x.shape[:-1] for x in inputs))
    return F.linear(torch.cat([x.expand(*leading, -1) for x in inputs], -1), weight, bias)


def split(inputs, weight, bias):
    first, second = weight.split([x.size(-1) for x in inputs], -1)
    return F.linear(inputs[1], second, bias) + F.linear(inputs[0], first)


def stock(case):
    forms = eager_and_compiled(as_called(concatenated))
    by_parts = eager_and_compiled(as_called(split))
    return forms | {f"{name} split": form for name, form in by_parts.items()}


def work(case, which):
    b, t, c, k = (case.sizes[letter] for letter in "BTCK")
    shared = 1 if case.options.get("shared") else t
    operations = 2 * b * (shared + t) * c * k
    floats = b * (shared + t) * c + 2 * c * k + b * t * k
    return Work(operations, 4 * floats) if which == FORWARD else Work(3 * operations, 12 * floats)


def sizes(b, t, c, k):
    return {"B": b, "T": t, "C": c, "K": k}


BENCHMARK = Benchmark(
    op="concat_linear",
    cases=[
        Case(sizes(32, 20, 512, 512), {"shared": True}, "first shared over T"),
        Case(sizes(32, 20, 512, 512)),
        Case(sizes(32, 16, 192, 192), {"shared": True}, "captioner student", quick=True),
    ],
    make=make,
    stock=stock,
    work=work,
)

if __name__ == "__main__":
    run_script(BENCHMARK, Path(__file__).resolve().parent)
