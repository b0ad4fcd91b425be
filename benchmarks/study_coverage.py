"""What `auto` gains on the convolution layers of real models, and how much of their time it covers.

    python -m benchmarks.study_coverage [MODEL ...] [--batch 1] [--batch 8] [--layers] [--peers]

`layers/<model>.jsonl` holds the distinct convolution layers of a model, batch normalisation folded
into bias, activation and residual fused where the model has them, with how often each occurs. Every
layer is timed in inference, float32, one thread, by the CPU time of the process and on a warm heap:
stock PyTorch (convolution, residual and activation in place, pool) with x and weight in NCHW and in
channels_last, our kernels by name and `auto` in both layouts, interleaved. Of a layer and a form
the least time of the rounds stands. A model's PyTorch time is that of its faster layout, or with
`--layers` a layer's. `--peers` times each layer in inference engines, too, in the same rounds; a
model's ratio is their time of all its layers over that of `auto` in its faster layout.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import mbm_kernels
from mbm_kernels import engines
from mbm_kernels._core import dispatch, timing
from mbm_kernels.bench import isa, machine, results
from mbm_kernels.bench.benchmark import Held
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


@dataclass(frozen=True)
class Tensors:
    """What a layer is called with."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor | None

    @classmethod
    def drawn(cls, layer: Layer, batch: int) -> "Tensors":
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        taps = layer.C // layer.groups * layer.kernel[0] * layer.kernel[1]
        x = draw(batch, layer.C, layer.Y, layer.X)
        weight = draw(layer.K, layer.C // layer.groups, *layer.kernel) / math.sqrt(taps)
        bias = draw(layer.K)
        shape = F.conv2d(x, weight, bias, *convolution(layer)).shape
        return cls(x, weight, bias, draw(*shape) if layer.residual else None)

    def laid_out(self, memory: torch.memory_format) -> "Tensors":
        residual = self.residual
        return replace(
            self,
            x=self.x.contiguous(memory_format=memory),
            weight=self.weight.contiguous(memory_format=memory),
            residual=None if residual is None else residual.contiguous(memory_format=memory),
        )


def convolution(layer: Layer) -> tuple[Any, ...]:
    """What F.conv2d takes behind its tensors."""
    return layer.stride, layer.padding, 1, layer.groups


def stock(layer: Layer) -> Callable[..., Tensor]:
    """The layer in plain PyTorch, of the names of `Tensors`."""
    activate = None if layer.activation is None else TABLE[layer.activation].in_place
    pool = layer.max_pool
    window = (pool, pool, 0) if isinstance(pool, int) else pool

    def run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        z = F.conv2d(x, weight, bias, *convolution(layer))
        if residual is not None:
            z = z.add_(residual)
        if window is not None:
            z = F.max_pool2d(z, *window)
        return z if activate is None else activate(z)

    return run


def kernel(layer: Layer, tensors: Tensors, backend: str) -> Call:
    return lambda: mbm_kernels.conv_bias_act(
        tensors.x,
        tensors.weight,
        tensors.bias,
        stride=layer.stride,
        padding=layer.padding,
        groups=layer.groups,
        residual=tensors.residual,
        activation=layer.activation,
        max_pool=layer.max_pool,
        backend=backend,
    )


def forms(layer: Layer, drawn: Tensors) -> dict[str, Call]:
    """Calls by "<form> <layout>"."""
    found: dict[str, Call] = {}
    for layout, memory in LAYOUTS.items():
        tensors = drawn.laid_out(memory)
        found[f"torch {layout}"] = partial(stock(layer), **vars(tensors))
        for backend in ("cpu", "auto"):
            found[f"{backend} {layout}"] = kernel(layer, tensors, backend)
    return found


def engine_sessions(layer: Layer, drawn: Tensors, compiled: bool) -> engines.Sessions:
    weights = {"weight": drawn.weight, "bias": drawn.bias}
    given = {"x": drawn.x, "residual": drawn.residual}
    module = Held(stock(layer), {n: torch.nn.Parameter(w) for n, w in weights.items()})
    model = engines.Model.of(module, {n: x for n, x in given.items() if x is not None})
    return engines.sessions(model, model.truth(), compiled=compiled)


def measure(
    layer: Layer, batch: int, peers: bool = False, compiled: bool = False
) -> dict[str, Any]:
    """Nanoseconds of CPU time by "<form> <layout>", and what `auto` takes by layout.

    With `peers` also `engines`, {name: {version, error, ns}}, and `no_engines`, {name: reason}.
    """
    drawn = Tensors.drawn(layer, batch)
    calls = forms(layer, drawn)
    takes = {}
    for layout in LAYOUTS:
        with dispatch.watched() as seen:
            calls[f"auto {layout}"]()
        takes[layout] = seen[-1]
    found = engine_sessions(layer, drawn, compiled) if peers else engines.Sessions()
    times = timing.interleave(
        calls | found.calls(),
        SECONDS_EACH,
        min_rounds=MIN_ROUNDS,
        max_rounds=MAX_ROUNDS,
        sampler=timing.cpu_sample,
    )
    least = {name: round(float(t.min())) for name, t in times.items()}
    row = {"takes": takes, **{name: least[name] for name in calls}}
    if peers:
        row["engines"] = {n: {**vars(m), "ns": least[n]} for n, m in found.measured.items()}
        row["no_engines"] = found.missing
    return row


def against_engines(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Each engine's time of all layers over that of `auto` in its faster layout.

    Where an engine does not run some layers, over those that it runs, with their number.
    """
    found = {}
    for name in engines.ENGINES:
        ran = [row for row in rows if name in row.get("engines", {})]
        if not ran:
            continue
        theirs = sum(row["engines"][name]["ns"] * row["count"] for row in ran)
        ours = min(sum(row[f"auto {x}"] * row["count"] for row in ran) for x in LAYOUTS)
        some = f" ({len(ran)} of {len(rows)})" if len(ran) < len(rows) else ""
        found[name] = f"{theirs / ours:.2f}{some}"
    return found


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
    peers: Annotated[bool, typer.Option("--peers", help="engines of '.[peers]', too")] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="of them also those that compile for minutes")
    ] = False,
    save: Annotated[bool, typer.Option(help="write the rows into results/<device>/")] = False,
) -> None:
    machine.run_in_heap("warm", "benchmarks.study_coverage")
    torch.set_num_threads(1)
    isa.check(isa.record())
    if peers:
        isa.check_engines()
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
    beside = Table(title="engine's time / auto's, of all layers")
    for name in ("model", "B", *engines.ENGINES):
        beside.add_column(name, justify="left" if name == "model" else "right")
    missing: dict[str, str] = {}
    for model in names or models():
        for size in batch or (1, 8):
            rows = []
            with torch.no_grad():
                for layer in layers(model):
                    rows.append({"model": model, "B": size, "layer": str(layer)})
                    rows[-1] |= {"count": layer.count, **measure(layer, size, peers, compiled)}
                    missing |= rows[-1].get("no_engines", {})
            if path is not None:
                with path.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)
            if detail:
                console.print(by_layer(rows, f"{model} B{size}"))
            table.add_row(model, str(size), *summary(rows))
            ratios = against_engines(rows)
            beside.add_row(model, str(size), *(ratios.get(name, "") for name in engines.ENGINES))
    console.print(table)
    if peers:
        console.print(beside)
        for name, reason in missing.items():
            console.print(f"no {name}: {reason}", style="dim", markup=False)
    if path is not None:
        console.print(str(path))


if __name__ == "__main__":
    typer.run(main)
