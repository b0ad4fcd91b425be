"""concat_linear against a linear layer over the concatenation, and against split products."""

from pathlib import Path

import torch
import torch.nn.functional as F

from mbm_kernels.bench import (
    FORWARD,
    Benchmark,
    Case,
    Work,
    as_called,
    eager_and_compiled,
    frozen,
    holding,
)
from mbm_kernels.bench.cli import run_script
from mbm_kernels.models.captioner_config import SIZES


def widths(case):
    """Features of the two inputs; C' where the second's differ."""
    return case.sizes["C"], case.sizes.get("C'", case.sizes["C"])


def make(case, generator):
    b, t, k = (case.sizes[letter] for letter in "BTK")
    c, last = widths(case)

    def randn(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator) * scale

    shared = 1 if case.options.get("shared") else t
    return {
        "inputs": [randn(b, shared, c), randn(b, t, last)],
        "weight": randn(k, c + last, scale=(c + last) ** -0.5),
        "bias": randn(k, scale=0.1),
    }


def concatenated(inputs, weight, bias):
    first, last = inputs  # torch.broadcast_shapes would take 7 us
    return F.linear(torch.cat([first.expand(*last.shape[:-1], -1), last], -1), weight, bias)


def split(inputs, weight, bias):
    first, second = weight.split([x.size(-1) for x in inputs], -1)
    # No product's result is saved for the backward pass.
    return F.linear(inputs[1], second, bias).add_(F.linear(inputs[0], first))


def stock(case):
    forms = eager_and_compiled(as_called(concatenated))
    forms |= frozen(holding(concatenated, ("weight", "bias")))
    by_parts = eager_and_compiled(as_called(split))
    by_parts |= frozen(holding(split, ("weight", "bias")))
    return forms | {f"{name} split": form for name, form in by_parts.items()}


def work(case, which):
    b, t, k = (case.sizes[letter] for letter in "BTK")
    c, last = widths(case)
    shared = 1 if case.options.get("shared") else t
    operations = 2 * b * (shared * c + t * last) * k
    floats = b * (shared * c + t * last) + (c + last) * k + b * t * k
    return Work(operations, 4 * floats) if which == FORWARD else Work(3 * operations, 12 * floats)


def sizes(b, t, c, k):
    return {"B": b, "T": t, "C": c, "K": k}


def captioner(size):
    """The image vector beside the words' embeddings."""
    found = SIZES[size]
    shape = sizes(32, 16, found.features, found.hidden) | {"C'": found.embedding}
    return Case(shape, {"shared": True}, f"captioner {size}", quick=size == "student")


BENCHMARK = Benchmark(
    op="concat_linear",
    cases=[
        Case(sizes(32, 20, 512, 512), {"shared": True}, "first shared over T"),
        Case(sizes(32, 20, 512, 512)),
        *(captioner(size) for size in SIZES),
        Case(sizes(32, 1, 512, 512), note="one step"),
        Case(sizes(4, 8, 64, 64), {"shared": True}, "first shared over T"),
        Case(sizes(32, 4, 128, 192), {"shared": True}, "as little as auto takes"),
        Case(sizes(8, 100, 256, 1000), {"shared": True}, "first shared over T"),
    ],
    gpu_cases=[
        Case(sizes(64, 20, 512, 512), {"shared": True}, "first shared over T", quick=True),
        Case(sizes(64, 20, 512, 512)),
    ],
    make=make,
    stock=stock,
    work=work,
)

if __name__ == "__main__":
    run_script(BENCHMARK, Path(__file__).resolve().parent)
