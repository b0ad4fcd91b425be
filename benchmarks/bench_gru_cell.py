"""gru_cell against torch.nn.GRUCell."""

from pathlib import Path

import torch

from mbm_kernels.bench import FORWARD, Benchmark, Case, Work, eager_and_compiled, frozen
from mbm_kernels.bench.cli import run_script
from mbm_kernels.models.captioner_config import SIZES


def make(case, generator):
    b, c, h = (case.sizes[letter] for letter in "BCH")

    def randn(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator) * scale

    return {
        "x": randn(b, c),
        "h": randn(b, h),
        "w_ih": randn(3 * h, c, scale=c**-0.5),
        "w_hh": randn(3 * h, h, scale=h**-0.5),
        "b_ih": randn(3 * h, scale=0.1),
        "b_hh": randn(3 * h, scale=0.1),
    }


def stock_module(inputs):
    cell = torch.nn.GRUCell(inputs["x"].size(1), inputs["h"].size(1))
    cell.weight_ih, cell.weight_hh = inputs["w_ih"], inputs["w_hh"]
    cell.bias_ih, cell.bias_hh = inputs["b_ih"], inputs["b_hh"]
    return cell, {"input": inputs["x"], "hx": inputs["h"]}


def one_step(inputs):
    """ONNX has no cell: a layer of one step is what its engines have a kernel for."""
    layer = torch.nn.GRU(inputs["x"].size(1), inputs["h"].size(1))
    layer.weight_ih_l0, layer.weight_hh_l0 = inputs["w_ih"], inputs["w_hh"]
    layer.bias_ih_l0, layer.bias_hh_l0 = inputs["b_ih"], inputs["b_hh"]
    return LastState(layer), {"input": inputs["x"][None], "hx": inputs["h"][None]}


class LastState(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, input, hx):
        return self.layer(input, hx)[1][0]


def work(case, which):
    b, c, h = (case.sizes[letter] for letter in "BCH")
    operations, weights = 6 * b * h * (c + h), 3 * h * (c + h + 2)
    if which == FORWARD:
        return Work(operations, 4 * (weights + b * (c + 2 * h)))
    return Work(3 * operations, 4 * (2 * weights + b * (2 * c + 12 * h)))


def sizes(b, c, h):
    return {"B": b, "C": c, "H": h}


def captioner(size):
    hidden = SIZES[size].hidden
    return Case(sizes(32, hidden, hidden), note=f"captioner {size}")


BENCHMARK = Benchmark(
    op="gru_cell",
    cases=[
        Case(sizes(1, 256, 512), quick=True),
        *(captioner(size) for size in SIZES),
        Case(sizes(1, 16, 64), note="tiny"),
    ],
    gpu_cases=[
        Case(sizes(320, 512, 512), quick=True),
        Case(sizes(1, 256, 512)),
    ],
    make=make,
    stock=lambda case: eager_and_compiled(stock_module) | frozen(stock_module),
    work=work,
    engine=lambda case: one_step,
)

if __name__ == "__main__":
    run_script(BENCHMARK, Path(__file__).resolve().parent)
