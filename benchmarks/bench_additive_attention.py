"""additive_attention against the broadcast form, eager and compiled."""

from pathlib import Path

import torch

from mbm_kernels.bench import FORWARD, Benchmark, Case, Work, as_called, eager_and_compiled
from mbm_kernels.bench.cli import run_script


def make(case, generator):
    b, t, s, d, e = (case.sizes[letter] for letter in "BTSDE")

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = {"query": randn(b, t, d), "key": randn(b, s, d), "value": randn(b, s, e)}
    inputs["v"] = randn(d) * d**-0.5
    if case.options.get("lengths"):
        inputs["key_lengths"] = torch.randint(s // 4, s + 1, (b,), generator=generator)
    return inputs


def broadcast(query, key, value, v, key_lengths=None):
    scores = torch.tanh(query[:, :, None] + key[:, None]) @ v
    if key_lengths is not None:
        outside = torch.arange(key.size(1)) >= key_lengths[:, None]
        scores = scores.masked_fill(outside[:, None], -torch.inf)
    weights = scores.softmax(-1)
    return weights @ value, weights


def work(case, which):
    b, t, s, d, e = (case.sizes[letter] for letter in "BTSDE")
    floats = b * (t * d + s * d + s * e + t * e + t * s) + d
    # An element of [B, T, S, D]: a product, an addition, a reciprocal and two FMAs make a term of
    # the score; its gradient is the same once more and an FMA into each of query, key and v.
    if which == FORWARD:
        return Work(b * t * s * (6 * d + 2 * e), 4 * floats)
    return Work(b * t * s * (18 * d + 6 * e), 12 * floats)


def sizes(b, t, s, d, e):
    return {"B": b, "T": t, "S": s, "D": d, "E": e}


BENCHMARK = Benchmark(
    op="additive_attention",
    cases=[
        # The reference in float64 would take 3 GB at B 16.
        Case(sizes(16, 20, 196, 512, 512), check={"B": 4}),
        Case(sizes(16, 20, 196, 512, 512), {"lengths": True}, "lengths", check={"B": 4}),
        Case(sizes(64, 1, 196, 512, 512), note="step", passes=(FORWARD,)),
        Case(sizes(32, 16, 64, 256, 256), note="captioner teacher"),
        Case(sizes(32, 16, 64, 128, 128), note="captioner student", quick=True),
    ],
    make=make,
    stock=lambda case: eager_and_compiled(as_called(broadcast)),
    work=work,
)

if __name__ == "__main__":
    run_script(BENCHMARK, Path(__file__).resolve().parent)
