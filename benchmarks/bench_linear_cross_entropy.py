"""linear_cross_entropy against F.linear and F.cross_entropy, and torch's own chunked form."""

from pathlib import Path

import torch
import torch.nn.functional as F

from mbm_kernels.bench import FORWARD, Benchmark, Case, Form, Work, as_called, eager_and_compiled
from mbm_kernels.bench.cli import run_script
from mbm_kernels.models.captioner_config import SIZES

IGNORE = -100


def make(case, generator):
    n, h, v = (case.sizes[letter] for letter in "NHV")
    target = torch.randint(v, (n,), generator=generator)
    target[torch.rand(n, generator=generator) < case.options.get("ignored", 0.0)] = IGNORE
    return {
        "hidden": torch.randn(n, h, generator=generator),
        "weight": torch.randn(v, h, generator=generator) * h**-0.5,
        "target": target,
        "bias": torch.randn(v, generator=generator) * 0.1,
    }


def layers(hidden, weight, target, bias):
    return F.cross_entropy(F.linear(hidden, weight, bias), target)


def kept_rows(hidden, weight, target, bias):
    kept = target != IGNORE
    return F.cross_entropy(F.linear(hidden[kept], weight, bias), target[kept])


def chunked(hidden, weight, target, bias):
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, target, linear_bias=bias, options=options)


def stock(case):
    forms = eager_and_compiled(as_called(layers))
    if case.options.get("ignored"):
        forms["eager kept rows"] = Form(as_called(kept_rows))
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch 2.13
        forms["F.linear_cross_entropy"] = Form(as_called(chunked))
    return forms


def work(case, which):
    n, h, v = (case.sizes[letter] for letter in "NHV")
    n = n * (1 - case.options.get("ignored", 0.0))
    floats = n * h + v * h + v
    if which == FORWARD:
        return Work(2 * n * h * v, 4 * floats)
    return Work(6 * n * h * v, 8 * floats)


def sizes(n, h, v):
    return {"N": n, "H": h, "V": v}


def captioner(size):
    shape, quick = sizes(512, SIZES[size].hidden, 2000), size == "student"
    return Case(shape, note=f"captioner {size}", quick=quick, check={"N": 128})


BENCHMARK = Benchmark(
    op="linear_cross_entropy",
    cases=[
        Case(sizes(1280, 512, 10000), check={"N": 160}),
        Case(sizes(1280, 512, 10000), {"ignored": 0.4}, "40 % ignored", check={"N": 160}),
        *(captioner(size) for size in SIZES),
        Case(sizes(32, 512, 1000), note="as little as auto takes"),
        Case(sizes(8, 512, 10000), note="few rows"),
    ],
    gpu_cases=[
        Case(sizes(1280, 512, 10000), quick=True),
        Case(sizes(1280, 512, 10000), {"ignored": 0.4}, "40 % ignored"),
        Case(sizes(8192, 1024, 32000)),
    ],
    make=make,
    stock=stock,
    work=work,
)

if __name__ == "__main__":
    run_script(BENCHMARK, Path(__file__).resolve().parent)
