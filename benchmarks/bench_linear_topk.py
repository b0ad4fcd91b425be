"""linear_topk, the vocabulary of a decoding step, against a product, topk and its normaliser.

Which of two equal logits comes first is left open by every stock form: torch.topk says nothing.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from mbm_kernels.bench import FORWARD, Benchmark, Case, Work, eager_and_compiled, holding
from mbm_kernels.bench.cli import run_script
from mbm_kernels.models.captioner_config import SIZES


def make(case, generator):
    r, h, v = (case.sizes[letter] for letter in "RHV")
    return {
        "hidden": torch.randn(r, h, generator=generator),
        "weight": torch.randn(v, h, generator=generator) * h**-0.5,
        "bias": torch.randn(v, generator=generator),
        "k": case.sizes["k"],
    }


def largest(x, k):
    return x.max(-1, keepdim=True) if k == 1 else x.topk(k)


def by_log_softmax(hidden, weight, bias, k):
    values, ids = largest(F.linear(hidden, weight, bias).log_softmax(-1), k)
    return values, ids


def by_logsumexp(hidden, weight, bias, k):
    """[R, V] is written once less, but ATen's logsumexp is several operations."""
    logits = F.linear(hidden, weight, bias)
    values, ids = largest(logits, k)
    return values - logits.logsumexp(-1, keepdim=True), ids


def stock(case):
    forms = {"log_softmax": by_log_softmax, "logsumexp": by_logsumexp}
    return {
        f"{name} {how}": form
        for name, function in forms.items()
        for how, form in eager_and_compiled(lambda inputs, f=function: (f, inputs)).items()
    }


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
    stock=stock,
    work=work,
    engine=lambda case: holding(by_log_softmax, ("weight", "bias")),
)

if __name__ == "__main__":
    run_script(BENCHMARK, Path(__file__).resolve().parent)
