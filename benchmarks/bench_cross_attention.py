"""cross_attention against SDPA without weights, and the products and softmax with them."""

from pathlib import Path

import torch
import torch.nn.functional as F

from mbm_kernels.bench import FORWARD, Benchmark, Case, Work, as_called, eager_and_compiled
from mbm_kernels.bench.cli import run_script
from mbm_kernels.models.captioner_config import SIZES


def make(case, generator):
    b, n, t, s, d = (case.sizes[letter] for letter in "BNTSD")

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = {"query": randn(b, n, t, d), "key": randn(b, n, s, d), "value": randn(b, n, s, d)}
    if case.options.get("lengths"):
        inputs["key_lengths"] = torch.randint(s // 4, s + 1, (b,), generator=generator)
    return inputs | {"need_weights": case.options.get("need_weights")}


def inside(key, key_lengths):
    """bool [B, 1, 1, S], or None where every key counts."""
    if key_lengths is None:
        return None
    positions = torch.arange(key.size(2), device=key.device)
    return (positions < key_lengths[:, None].to(key.device))[:, None, None]


def sdpa(query, key, value, need_weights=None, key_lengths=None):
    return F.scaled_dot_product_attention(query, key, value, inside(key, key_lengths))


def products(query, key, value, need_weights, key_lengths=None):
    # The scale on the query touches fewer elements than on the scores.
    scores = (query * query.size(-1) ** -0.5) @ key.transpose(-1, -2)
    if key_lengths is not None:
        scores = scores.masked_fill_(~inside(key, key_lengths), -torch.inf)
    weights = scores.softmax(-1)
    return weights @ value, weights.mean(1) if need_weights == "mean" else weights


def stock(case):
    form = sdpa if case.options.get("need_weights") is None else products
    return eager_and_compiled(as_called(form))


def engine(case):
    if case.options.get("lengths"):
        return "engines take no lengths"
    return as_called(sdpa if case.options.get("need_weights") is None else products)


def work(case, which):
    b, n, t, s, d = (case.sizes[letter] for letter in "BNTSD")
    floats = b * n * (2 * t + 2 * s) * d
    floats += {"mean": b * t * s, "heads": b * n * t * s}.get(case.options.get("need_weights"), 0)
    operations = 4 * b * n * t * s * d
    if which == FORWARD:
        return Work(operations, 4 * floats)
    return Work(3 * operations, 12 * floats)


def sizes(b, n, t, s, d):
    return {"B": b, "N": n, "T": t, "S": s, "D": d}


def captioner(size):
    widths = SIZES[size]
    shape = sizes(32, widths.heads, 16, 64, widths.features // widths.heads)
    return Case(shape, MEAN, f"captioner {size}", quick=size == "student")


MEAN = {"need_weights": "mean"}

BENCHMARK = Benchmark(
    op="cross_attention",
    cases=[
        Case(sizes(16, 8, 20, 196, 64)),
        Case(sizes(16, 8, 20, 196, 64), MEAN, "mean weights"),
        Case(sizes(16, 8, 20, 196, 64), {"need_weights": "heads"}, "weights of heads"),
        *(captioner(size) for size in SIZES),
        Case(sizes(16, 8, 20, 196, 64), MEAN | {"lengths": True}, "mean weights, lengths"),
        Case(sizes(16, 8, 1, 196, 64)),
        Case(sizes(2, 8, 196, 196, 64)),
        Case(sizes(1, 8, 20, 49, 64)),
        Case(sizes(1, 4, 512, 512, 32)),
    ],
    gpu_cases=[
        Case(sizes(64, 8, 20, 196, 64), quick=True, check={"B": 4}),
        Case(sizes(64, 8, 20, 196, 64), MEAN, "mean weights", quick=True, check={"B": 4}),
        Case(sizes(64, 8, 20, 196, 64), MEAN | {"lengths": True}, "lengths", check={"B": 4}),
        Case(sizes(64, 8, 20, 49, 64), check={"B": 4}),
    ],
    make=make,
    stock=stock,
    work=work,
    engine=engine,
)

if __name__ == "__main__":
    run_script(BENCHMARK, Path(__file__).resolve().parent)
