"""linear_topk, the vocabulary of a decoding step, against a product, topk and logsumexp."""

from pathlib import Path

import torch
import torch.nn.functional as F

from mbm_kernels.bench import FORWARD, Benchmark, Case, Work, eager_and_compiled
from mbm_kernels.bench.cli import run_script
from mbm_kernels.models.captioner import SIZES


def make(case, generator):
    r, h, v = (case.sizes[letter] for letter in "RHV")
    return {
        "hidden": torch.randn(r, h, generator=generator),
        "weight": torch.randn(v, h, generator=generator) * h**-0.5,
        "bias": torch.randn(v, generator=generator),
        "k": case.sizes["k"],
    }


def by_topk(hidden, weight, bias, k):
    """Which of two equal logits comes first is left open."""
    logits = F.linear(hidden, weight, bias)
    values, ids = logits.topk(k)
    return values - logits.logsumexp(-1, keepdim=True), ids


def work(case, which):
    r, h, v, k = (case.sizes[letter] for letter in "RHVk")
    return Work(2 * r * h * v, 4 * (r * h + v * (h + 1) + 3 * r * k), special=r * v)


def sizes(r, h, v, k):
    return {"R": r, "H": h, "V": v, "k": k}


def captioner(size, beam):
    shape = sizes(32 * beam, SIZES[size].hidden, 2000, beam)
    quick = size == "student" and beam == 1
    return Case(shape, note=f"captioner {size}", passes=(FORWARD,), quick=quick)


def case(shape, note="", quick=False):
    return Case(shape, note=note, passes=(FORWARD,), quick=quick)


BENCHMARK = Benchmark(
    op="linear_topk",
    cases=[
        *(captioner(size, beam) for size in SIZES for beam in (1, 5)),
        case(sizes(32, 512, 10000, 1)),
        case(sizes(320, 512, 10000, 5)),
        case(sizes(1, 192, 2000, 1), "one row"),
        case(sizes(5, 192, 500, 5), "as little as auto takes"),
        case(sizes(32, 512, 10000, 16), "most"),
    ],
    gpu_cases=[
        case(sizes(320, 512, 10000, 5), quick=True),
        case(sizes(64, 512, 10000, 1)),
    ],
    make=make,
    stock=lambda case: eager_and_compiled(lambda inputs: (by_topk, inputs)),
    work=work,
)

if __name__ == "__main__":
    run_script(BENCHMARK, Path(__file__).resolve().parent)
