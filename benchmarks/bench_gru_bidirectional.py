"""A bidirectional layer, nn.GRU's, against torch's own."""

from pathlib import Path

import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import mbm_kernels
from mbm_kernels.bench import FORWARD, Benchmark, Case, Form, Work, eager_and_compiled
from mbm_kernels.bench.cli import run_script

NAMES = {"weight_ih": "w_ih", "weight_hh": "w_hh", "bias_ih": "b_ih", "bias_hh": "b_hh"}


def make(case, generator):
    b, t, c, h = (case.sizes[letter] for letter in "BTCH")

    def randn(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator) * scale

    inputs = {"x": randn(t, b, c), "h0": randn(2, b, h)}
    for suffix in ("", "_reverse"):
        inputs["w_ih" + suffix] = randn(3 * h, c, scale=c**-0.5)
        inputs["w_hh" + suffix] = randn(3 * h, h, scale=h**-0.5)
        inputs["b_ih" + suffix] = randn(3 * h, scale=0.1)
        inputs["b_hh" + suffix] = randn(3 * h, scale=0.1)
    if case.options.get("lengths") == "half":
        # Mean T / 2, spread over the whole range.
        inputs["lengths"] = torch.linspace(1, t - 1, b).round().long()
    return inputs


def layer(kind, inputs):
    """The layer whose parameters are the inputs' own."""
    module = kind(inputs["w_ih"].size(1), inputs["w_hh"].size(1), bidirectional=True)
    for suffix in ("", "_reverse"):
        for theirs, ours in NAMES.items():
            setattr(module, f"{theirs}_l0{suffix}", inputs[ours + suffix])
    return module


def build_from(kind):
    def padded(inputs):
        return layer(kind, inputs), {"input": inputs["x"], "hx": inputs["h0"]}

    def packed(inputs):
        module, lengths = layer(kind, inputs), inputs["lengths"]

        def run(x, h0):
            sequence = pack_padded_sequence(x, lengths, enforce_sorted=False)
            y, h_n = module(sequence, h0)
            return pad_packed_sequence(y, total_length=x.size(0))[0], h_n

        return run, {"x": inputs["x"], "h0": inputs["h0"]}

    return lambda inputs: (packed if "lengths" in inputs else padded)(inputs)


def stock(case):
    build = build_from(torch.nn.GRU)
    # torch.compile leaves nn.GRU to eager.
    return {"PackedSequence": Form(build)} if case.options else eager_and_compiled(build)


def engine(case):
    return "engines take no lengths" if case.options else build_from(torch.nn.GRU)


def work(case, which):
    b, t, c, h = (case.sizes[letter] for letter in "BTCH")
    steps = b * t // 2 if case.options.get("lengths") else b * t
    operations = 2 * 2 * steps * 3 * h * (c + h)
    weights = 2 * 3 * h * (c + h + 2)
    if which == FORWARD:
        return Work(operations, 4 * (weights + steps * (c + 2 * h)))
    # Each direction's saved state of 4H a step is written and read; every input has a gradient.
    return Work(3 * operations, 4 * (2 * weights + steps * (2 * c + 6 * h + 16 * h)))


def sizes(b, t, c, h):
    return {"B": b, "T": t, "C": c, "H": h}


BENCHMARK = Benchmark(
    op="gru_bidirectional",
    cases=[
        Case(sizes(1, 32, 256, 256), quick=True),
        Case(sizes(1, 32, 512, 512)),
        Case(sizes(16, 32, 256, 512)),
        Case(sizes(32, 64, 512, 512), {"lengths": "half"}, "lengths T/2"),
    ],
    gpu_cases=[
        Case(sizes(32, 32, 512, 512), quick=True, check={"B": 4}),
        Case(sizes(1, 32, 512, 512)),
    ],
    make=make,
    stock=stock,
    function=build_from(mbm_kernels.nn.GRU),
    work=work,
    engine=engine,
)

if __name__ == "__main__":
    run_script(BENCHMARK, Path(__file__).resolve().parent)
