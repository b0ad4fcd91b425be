"""gru against torch.nn.GRU, packed and padded where rows have lengths."""

from pathlib import Path

import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from mbm_kernels.bench import FORWARD, Benchmark, Case, Form, Work, eager_and_compiled
from mbm_kernels.bench.cli import run_script
from mbm_kernels.models.captioner_config import SIZES


def make(case, generator):
    b, t, c, h = (case.sizes[letter] for letter in "BTCH")

    def randn(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator) * scale

    inputs = {
        "x": randn(t, b, c),
        "h0": randn(b, h),
        "w_ih": randn(3 * h, c, scale=c**-0.5),
        "w_hh": randn(3 * h, h, scale=h**-0.5),
        "b_ih": randn(3 * h, scale=0.1),
        "b_hh": randn(3 * h, scale=0.1),
    }
    if case.options.get("lengths") == "half":
        # Mean T / 2, spread over the whole range.
        inputs["lengths"] = torch.linspace(1, t - 1, b).round().long()
    return inputs


def stock_module(inputs, kind=torch.nn.GRU):
    """The stock layer whose parameters are the inputs' own."""
    module = kind(inputs["w_ih"].size(1), inputs["w_hh"].size(1))
    module.weight_ih_l0, module.weight_hh_l0 = inputs["w_ih"], inputs["w_hh"]
    module.bias_ih_l0, module.bias_hh_l0 = inputs["b_ih"], inputs["b_hh"]
    return module


def padded(inputs):
    return stock_module(inputs), {"input": inputs["x"], "hx": inputs["h0"][None]}


def packed(inputs):
    module, lengths = stock_module(inputs), inputs["lengths"]

    def run(x, h0):
        sequence = pack_padded_sequence(x, lengths, enforce_sorted=False)
        y, h_n = module(sequence, h0[None])
        return pad_packed_sequence(y, total_length=x.size(0))[0], h_n

    return run, {"x": inputs["x"], "h0": inputs["h0"]}


def masked(inputs):
    module, lengths = stock_module(inputs), inputs["lengths"].to(inputs["x"].device)

    def run(x, h0):
        y, _ = module(x, h0[None])
        last = (lengths - 1)[None, :, None].expand(1, -1, y.size(2))
        outside = torch.arange(x.size(0), device=x.device)[:, None] >= lengths
        return y.masked_fill(outside[..., None], 0), y.gather(0, last)

    return run, {"x": inputs["x"], "h0": inputs["h0"]}


def stock(case):
    if case.options.get("lengths"):
        return {"PackedSequence": Form(packed), "padded, masked": Form(masked)}
    # torch.compile leaves nn.GRU to eager; unrolled over T (allow_rnn) it compiles for minutes.
    return eager_and_compiled(padded)


def work(case, which):
    b, t, c, h = (case.sizes[letter] for letter in "BTCH")
    steps = b * t // 2 if case.options.get("lengths") else b * t
    operations = 2 * steps * 3 * h * (c + h)
    weights = 3 * h * (c + h + 2)
    if which == FORWARD:
        return Work(operations, 4 * (weights + steps * (c + h)))
    # The saved state of 4H a step is written and read, and every input has a gradient.
    return Work(3 * operations, 4 * (2 * weights + steps * (2 * c + 3 * h + 8 * h)))


def sizes(b, t, c, h):
    return {"B": b, "T": t, "C": c, "H": h}


def captioner(size):
    hidden = SIZES[size].hidden
    return Case(sizes(32, 16, hidden, hidden), note=f"captioner {size}")


BENCHMARK = Benchmark(
    op="gru",
    cases=[
        Case(sizes(1, 32, 256, 256), quick=True),
        Case(sizes(1, 32, 512, 1024)),
        Case(sizes(16, 32, 256, 512)),
        Case(sizes(64, 20, 512, 512)),
        Case(sizes(32, 64, 512, 512), {"lengths": "half"}, "lengths T/2"),
        *(captioner(size) for size in SIZES),
    ],
    gpu_cases=[
        Case(sizes(32, 32, 512, 512), quick=True),
        Case(sizes(1, 32, 256, 256)),
        Case(sizes(64, 20, 512, 512)),
        Case(sizes(32, 64, 512, 1024)),
        Case(sizes(256, 16, 128, 128)),
    ],
    make=make,
    stock=stock,
    work=work,
    engine=lambda case: "engines take no lengths" if case.options.get("lengths") else padded,
)

if __name__ == "__main__":
    run_script(BENCHMARK, Path(__file__).resolve().parent)
