"""N steps of decoding with one key by additive_attention_keys, against the broadcast form.

"keys kept": they are made before the call that is timed, which is what a step costs once they are
there. "keys made": the call makes them and takes all its steps with them. bench_additive_attention
times steps that are given the key itself. The stock form has nothing of the key to prepare: its
projections are not in any of these.
"""

from pathlib import Path

import torch

from mbm_kernels import additive_attention, additive_attention_keys
from mbm_kernels.bench import FORWARD, Benchmark, Case, Work, eager_and_compiled
from mbm_kernels.bench.cli import run_script
from mbm_kernels.ops.additive_attention import reference


def make(case, generator):
    n, b, t, s, d, e = (case.sizes[letter] for letter in "NBTSDE")

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = {"query": randn(n, b, t, d), "key": randn(b, s, d), "value": randn(b, s, e)}
    return {**inputs, "v": randn(d) * d**-0.5, "case": case}


def steps_by(attend):
    """query [N, B, T, D] -> context and weights of each step, one after another."""

    def steps(query, key, value, v, case=None):
        return tuple(x for q in query for x in attend(q, key, value, v))

    return steps


def broadcast(query, key, value, v):
    weights = (torch.tanh(query[:, :, None] + key[:, None]) @ v).softmax(-1)
    return weights @ value, weights


def build(inputs):
    steps, given = steps_by(additive_attention), dict(inputs)
    if given.pop("case").options["kept"]:
        return steps, {**given, "key": additive_attention_keys(given["key"])}

    def make_and_step(key, **others):
        return steps(key=additive_attention_keys(key), **others)

    return make_and_step, given


def work(case, which):
    n, b, t, s, d, e = (case.sizes[letter] for letter in "NBTSDE")
    # As bench_additive_attention.py counts; key and value once, for a cache may hold them.
    operations = n * b * t * s * (4 * d + 2 * e)
    floats = b * (s * d + s * e + n * t * (d + e + s)) + d
    return Work(operations, 4 * floats, n * b * t * s * d / 2)


def sizes(n, b, t, s, d, e):
    return {"N": n, "B": b, "T": t, "S": s, "D": d, "E": e}


def case(shape, quick=False):
    kept = shape["N"] == 1
    return Case(shape, {"kept": kept}, "keys kept" if kept else "keys made", quick, (FORWARD,))


BENCHMARK = Benchmark(
    op="additive_attention_keys",
    cases=[
        case(sizes(1, 64, 1, 196, 512, 512)),
        case(sizes(1, 16, 1, 196, 512, 512)),
        case(sizes(1, 32, 1, 64, 192, 192), quick=True),
        case(sizes(1, 32, 5, 64, 192, 192)),
        case(sizes(8, 16, 1, 196, 512, 512)),
        case(sizes(8, 32, 1, 64, 192, 192)),
        case(sizes(8, 32, 5, 64, 192, 192), quick=True),
    ],
    gpu_cases=[case(sizes(8, 64, 1, 196, 512, 512), quick=True)],
    make=make,
    stock=lambda case: eager_and_compiled(
        lambda inputs: (steps_by(broadcast), {k: x for k, x in inputs.items() if k != "case"})
    ),
    work=work,
    function=build,
    reference=steps_by(reference.additive_attention),
    diff=(),
)

if __name__ == "__main__":
    run_script(BENCHMARK, Path(__file__).resolve().parent)
