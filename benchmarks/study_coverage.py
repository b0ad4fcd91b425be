"""What `auto` gains on the convolution layers of real models, and how much of their time it covers.

    python -m benchmarks.study_coverage [MODEL ...] [--batch 1] [--batch 8] [--layers]

`layers/<model>.jsonl` holds the distinct convolution layers of a model, batch normalisation folded
into bias, activation and residual fused where the model has them, with how often each occurs. Every
layer is timed in inference, float32, one thread, by the CPU time of the process and on a warm heap:
stock PyTorch (convolution, residual and activation in place, pool) with x and weight in NCHW and in
channels_last, our kernels by name and `auto` in both layouts, interleaved. Of a layer and a form
the least time of the rounds stands. A model's PyTorch time is that of its faster layout, or with
`--layers` a layer's.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import mbm_kernels
from mbm_kernels._core import dispatch, timing
from mbm_kernels.bench import isa, machine, results
from mbm_kernels.ops.conv_bias_act.activations import TABLE

HERE = Path(__file__).resolve().parent
LAYERS = HERE / "layers"
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
SECONDS_EACH = 0.05
MIN_ROUNDS, MAX_ROUNDS = 3, 12
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Layer:
    """A line of `layers/<model>.jsonl`: the options of `conv_bias_act`, and how often it occurs."""

    C: int
    K: int
    Y: int
    X: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int
    activation: str | None
    residual: bool
    max_pool: int | tuple[int, int, int] | None
    count: int

    def __str__(self) -> str:
        kernel = "x".join(map(str, self.kernel))
        parts = [f"{self.C}->{self.K} {kernel} @{self.Y}x{self.X}"]
        if self.stride != (1, 1):
            parts.append(f"stride {self.stride[0]},{self.stride[1]}")
        if self.groups > 1:
            parts.append(f"groups {self.groups}")
        parts += [self.activation] if self.activation else []
        parts += ["residual"] if self.residual else []
        parts += ["pool"] if self.max_pool else []
        return " ".join(parts)


def layers(model: str) -> list[Layer]:
    with (LAYERS / f"{model}.jsonl").open() as file:
        return [Layer(**_hashable(json.loads(line))) for line in file]


def _hashable(options: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}


def models() -> list[str]:
    return sorted(path.stem for path in LAYERS.glob("*.jsonl"))


def forms(layer: Layer, batch: int) -> Iterator[tuple[str, str, Call]]:
    """Names of a form and a layout, and calls."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    taps = layer.C // layer.groups * layer.kernel[0] * layer.kernel[1]
    image = draw(batch, layer.C, layer.Y, layer.X)
    kernels = draw(layer.K, layer.C // layer.groups, *layer.kernel) / math.sqrt(taps)
    bias = draw(layer.K)
    options = (layer.stride, layer.padding, 1, layer.groups)
    result = F.conv2d(image, kernels, bias, *options)
    shortcut = draw(*result.shape) if layer.residual else None
    activate = None if layer.activation is None else TABLE[layer.activation].in_place
    pool = layer.max_pool
    window = (pool, pool, 0) if isinstance(pool, int) else pool

    for layout, memory in LAYOUTS.items():
        x, weight = (t.contiguous(memory_format=memory) for t in (image, kernels))
        residual = None if shortcut is None else shortcut.contiguous(memory_format=memory)

        def stock(x: Tensor = x, weight: Tensor = weight, residual: Any = residual) -> Tensor:
            z = F.conv2d(x, weight, bias, *options)
            if residual is not None:
                z.add_(residual)
            if window is not None:
                z = F.max_pool2d(z, *window)
            return z if activate is None else activate(z)

        def kernel(
            backend: str, x: Tensor = x, weight: Tensor = weight, residual: Any = residual
        ) -> Call:
            return lambda: mbm_kernels.conv_bias_act(
                x,
                weight,
                bias,
                stride=layer.stride,
                padding=layer.padding,
                groups=layer.groups,
                residual=residual,
                activation=layer.activation,
                max_pool=pool,
                backend=backend,
            )

        yield "torch", layout, stock
        for backend in ("cpu", "auto"):
            yield backend, layout, kernel(backend)


def measure(layer: Layer, batch: int) -> dict[str, Any]:
    """Nanoseconds of CPU time by "<form> <layout>", and what `auto` takes by layout."""
    calls = {f"{form} {layout}": call for form, layout, call in forms(layer, batch)}
    takes = {}
    for layout in LAYOUTS:
        with dispatch.watched() as seen:
            calls[f"auto {layout}"]()
        takes[layout] = seen[-1]
    times = timing.interleave(
        calls, SECONDS_EACH, min_rounds=MIN_ROUNDS, max_rounds=MAX_ROUNDS, sampler=timing.cpu_sample
    )
    return {"takes": takes, **{name: round(float(t.min())) for name, t in times.items()}}


def by_layer(rows: list[dict[str, Any]], title: str) -> Table:
    """Each layer's share of the model, and PyTorch's least time over each of ours."""
    table = Table(title=title)
    names = [f"{form} {layout}" for form in ("cpu", "auto") for layout in LAYOUTS]
    for name in ("layer", "count", "torch us", "share", *names):
        table.add_column(name, justify="left" if name == "layer" else "right")
    best = [min(row[f"torch {layout}"] for layout in LAYOUTS) for row in rows]
    total = sum(ns * row["count"] for ns, row in zip(best, rows, strict=True))
    for ns, row in zip(best, rows, strict=True):
        cells = [str(row["count"]), f"{ns / 1e3:.1f}", f"{ns * row['count'] / total:.1%}"]
        table.add_row(row["layer"], *cells, *(f"{ns / row[name]:.2f}" for name in names))
    return table


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Milliseconds of all layers, ratios and the share of auto's time that our kernels take."""

    def total(form: str, layout: str) -> float:
        return sum(row[f"{form} {layout}"] * row["count"] for row in rows) / 1e6

    best = min(total("torch", layout) for layout in LAYOUTS)
    least = sum(min(row[f"torch {x}"] for x in LAYOUTS) * row["count"] for row in rows) / 1e6
    cells = [f"{best:.2f}", f"{least / best:.2f}"]
    for layout in LAYOUTS:
        ours = sum(
            row[f"auto {layout}"] * row["count"] for row in rows if row["takes"][layout] == "cpu"
        )
        auto = total("auto", layout)
        cells += [f"{best / total('cpu', layout):.2f}", f"{best / auto:.2f}"]
        cells.append(f"{ours / 1e6 / auto:.0%}")
    return cells


def main(
    names: Annotated[list[str] | None, typer.Argument(help="models; default: all")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="default: 1 and 8")] = None,
    detail: Annotated[
        bool, typer.Option("--layers", help="a table of each model's layers")
    ] = False,
    save: Annotated[bool, typer.Option(help="write the rows into results/<device>/")] = False,
) -> None:
    machine.run_in_heap("warm", "benchmarks.study_coverage")
    torch.set_num_threads(1)
    isa.check(isa.record())
    facts = {"heap": machine.heap(), "threads": 1}
    path = results.new_study(HERE / "results", "coverage", **facts) if save else None
    console = Console(width=170)
    table = Table(title=f"{machine.device()}: inference, 1 thread, warm heap")
    for name in ("model", "B"):
        table.add_column(name)
    columns = ("torch ms", "of it by layer")
    shown = [f"{form} {layout}" for layout in LAYOUTS for form in ("cpu", "auto", "covered")]
    for name in (*columns, *shown):
        table.add_column(name, justify="right")
    for model in names or models():
        for size in batch or (1, 8):
            rows = []
            with torch.no_grad():
                for layer in layers(model):
                    rows.append({"model": model, "B": size, "layer": str(layer)})
                    rows[-1] |= {"count": layer.count, **measure(layer, size)}
            if path is not None:
                with path.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)
            if detail:
                console.print(by_layer(rows, f"{model} B{size}"))
            table.add_row(model, str(size), *summary(rows))
    console.print(table)
    if path is not None:
        console.print(str(path))


if __name__ == "__main__":
    typer.run(main)
