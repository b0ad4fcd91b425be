"""additive_attention against the broadcast form, eager and compiled."""

from pathlib import Path

import torch

from mbm_kernels.bench import FORWARD, Benchmark, Case, Work, as_called, eager_and_compiled
from mbm_kernels.bench.cli import run_script
from mbm_kernels.models.captioner_config import SIZES


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
    # In place: a sum is not saved for the backward pass, and tanh saves its result.
    scores = (query[:, :, None] + key[:, None]).tanh_() @ v
    if key_lengths is not None:
        positions = torch.arange(key.size(1), device=key.device)
        outside = positions >= key_lengths[:, None].to(key.device)
        scores = scores.masked_fill_(outside[:, None], -torch.inf)
    weights = scores.softmax(-1)
    return weights @ value, weights


def work(case, which):
    b, t, s, d, e = (case.sizes[letter] for letter in "BTSDE")
    floats = b * (t * d + s * d + s * e + t * e + t * s) + d
    # An element of [B, T, S, D] forward: an addition, a tanh (counted as one operation) and an FMA.
    # Special functions: half a reciprocal, shared by two.
    # Backward: that tanh again, its derivative (an FMA), two products, a sum into each of query
    # and key and an FMA into v.
    if which == FORWARD:
        return Work(b * t * s * (4 * d + 2 * e), 4 * floats, b * t * s * d / 2)
    return Work(b * t * s * (14 * d + 6 * e), 12 * floats, b * t * s * d)


def sizes(b, t, s, d, e):
    return {"B": b, "T": t, "S": s, "D": d, "E": e}


def captioner(size):
    widths = SIZES[size]
    shape = sizes(32, 16, 64, widths.attention_size, widths.features)
    return Case(shape, note=f"captioner {size}", quick=size == "student")


BENCHMARK = Benchmark(
    op="additive_attention",
    cases=[
        # The reference in float64 would take 3 GB at B 16.
        Case(sizes(16, 20, 196, 512, 512), check={"B": 4}),
        Case(sizes(16, 20, 196, 512, 512), {"lengths": True}, "lengths", check={"B": 4}),
        # Steps of decoding, given the key itself; bench_additive_attention_keys.py prepares it.
        Case(sizes(64, 1, 196, 512, 512), note="step", passes=(FORWARD,)),
        Case(sizes(16, 1, 196, 512, 512), note="step", passes=(FORWARD,)),
        Case(sizes(32, 1, 64, 192, 192), note="captioner step", passes=(FORWARD,)),
        Case(sizes(32, 5, 64, 192, 192), note="captioner step, beam", passes=(FORWARD,)),
        *(captioner(size) for size in SIZES),
    ],
    gpu_cases=[
        Case(sizes(64, 20, 196, 512, 512), quick=True, check={"B": 4}),
        Case(sizes(64, 20, 49, 512, 512), check={"B": 4}),
        Case(sizes(64, 20, 196, 512, 512), {"lengths": True}, "lengths", check={"B": 4}),
        Case(sizes(64, 1, 196, 512, 512), note="step", passes=(FORWARD,), check={"B": 4}),
    ],
    make=make,
    stock=lambda case: eager_and_compiled(as_called(broadcast)),
    work=work,
)

if __name__ == "__main__":
    run_script(BENCHMARK, Path(__file__).resolve().parent)
