"""nn.MultiheadAttention with its averaged weights against torch's own."""

from pathlib import Path

import torch

import mbm_kernels
from mbm_kernels.bench import FORWARD, Benchmark, Case, Work, eager_and_compiled, frozen
from mbm_kernels.bench.cli import run_script

PARAMETERS = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")


def make(case, generator):
    b, n, t, s, d = (case.sizes[letter] for letter in "BNTSD")

    def randn(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator) * scale

    return {
        "query": randn(b, t, d),
        "memory": randn(b, s, d),
        "in_proj_weight": randn(3 * d, d, scale=d**-0.5),
        "in_proj_bias": randn(3 * d, scale=0.1),
        "out_proj.weight": randn(d, d, scale=d**-0.5),
        "out_proj.bias": randn(d, scale=0.1),
        "heads": n,
    }


def build_from(kind):
    def build(inputs):
        width = inputs["query"].size(-1)
        module = kind(width, inputs["heads"], batch_first=True).to(inputs["query"].dtype)
        module.in_proj_weight, module.in_proj_bias = (inputs[n] for n in PARAMETERS[:2])
        module.out_proj.weight, module.out_proj.bias = (inputs[n] for n in PARAMETERS[2:])
        memory = inputs["memory"]
        return module, {"query": inputs["query"], "key": memory, "value": memory}

    return build


def definition(**inputs):
    # Training mode: the inference fast path of eval mode takes no gradient.
    module, arguments = build_from(torch.nn.MultiheadAttention)(inputs)
    return module(**arguments)


def work(case, which):
    b, n, t, s, d = (case.sizes[letter] for letter in "BNTSD")
    operations = 4 * b * d * (d * (t + s) + t * s)  # four projections, scores and context
    moved = b * (d * (2 * t + s) + t * s) + 4 * d * d
    passes = 1 if which == FORWARD else 3
    return Work(passes * operations, 4 * passes * moved, special=b * n * t * s)


STOCK = build_from(torch.nn.MultiheadAttention)
BENCHMARK = Benchmark(
    op="multihead_attention",
    cases=[
        Case({"B": 16, "N": 8, "T": 20, "S": 196, "D": 512}),
        Case({"B": 8, "N": 4, "T": 16, "S": 64, "D": 128}, quick=True),
    ],
    gpu_cases=[
        Case({"B": 64, "N": 8, "T": 20, "S": 196, "D": 512}, quick=True, check={"B": 4}),
    ],
    make=make,
    stock=lambda case: eager_and_compiled(STOCK) | frozen(STOCK),
    function=lambda inputs: build_from(mbm_kernels.nn.MultiheadAttention)(inputs),
    reference=definition,
    work=work,
    engine=lambda case: STOCK,
    diff=("query", "memory", *PARAMETERS),
)

if __name__ == "__main__":
    run_script(BENCHMARK, Path(__file__).resolve().parent)
