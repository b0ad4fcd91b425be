"""What `auto` loses where convolutions follow each other in one native call (optimize/sequence.py).

    python -m benchmarks.study_sequences [--problems 350] [--seed 1000]

Convolutions are drawn as for `mbm-kernels calibrate` and timed in inference, in the same rounds:
the kernel as a step of a native call, the kernel called by itself, and the torch backend called by
itself, which is what parts a sequence in two. The table gives the time lost against always choosing
right by: what `auto` goes by among others, what it goes by for single calls, kernels always, and
PyTorch always. Rows are written as they come, into
results/<device>/<date>-<commit>-sequences.jsonl.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from mbm_kernels._core import cost, native, timing
from mbm_kernels.bench import calibrate, drawn, machine, results
from mbm_kernels.bench.drawn_times import MIN_ROUNDS, QUANTILE, SECONDS_EACH, sizes_of
from mbm_kernels.ops.conv_bias_act import backend_cpu
from mbm_kernels.ops.conv_bias_act.op import OP, described

HERE = Path(__file__).resolve().parent
MOST_PRODUCTS = 3e8


@dataclass(frozen=True)
class Row:
    """One convolution: nanoseconds as a step, called by itself, and of the torch backend."""

    label: str
    threads: int
    sizes: dict[str, int]
    step_ns: float
    call_ns: float
    torch_ns: float

    def predicted(self, table: cost.Table) -> cost.Predicted | None:
        return table.predict(OP.name, {**self.sizes, "training": 0}, self.threads)


def step(problem: drawn.Drawn) -> Callable[[], object] | None:
    """The native call of one step; None where tensors would be copied first."""
    (x, weight, *bias), options, _ = problem.make(torch.Generator().manual_seed(0))
    residual = options.get("residual")
    tensors = (x, weight, bias[0] if bias else None, residual)
    names = ("stride", "padding", "dilation", "groups", "activation", "max_pool")
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | options
    _, _, found = described(tensors, tuple(defaults.get(name) for name in names), "cpu")
    assert found is not None
    constant = backend_cpu.constant(found, weight, tensors[2])
    if constant is None:
        return None
    y = torch.empty_strided(constant.y_shape, constant.y_strides)
    call = native.cpu().ConvSequence(3)
    constant.add_to(call, [(0, 0), (-1, 0) if residual is None else (1, 0), (2, 0)])
    addresses = [x.data_ptr(), native.address(residual), y.data_ptr()]
    threads = torch.get_num_threads()
    kept = (x, residual, y, constant)
    return lambda: kept and call.run(addresses, threads)


def measured(seed: int, most: int) -> Iterator[Row]:
    """Problems in turn by all threads and one."""
    rng, all_threads, count = random.Random(f"sequences {seed}"), torch.get_num_threads(), 0
    while count < most:
        problem = drawn.draw(OP.name, rng, False)
        if problem.products > MOST_PRODUCTS:
            continue
        with timing.threads(1 if count % 2 else all_threads), torch.no_grad():
            of, as_step = problem.call(), step(problem)
            if as_step is None:
                continue
            forms = {"step": as_step, "call": of("cpu"), "torch": of("torch")}
            sizes = sizes_of(OP.name, forms["call"])
            times = timing.interleave(forms, SECONDS_EACH, min_rounds=MIN_ROUNDS)
            low = {name: round(float(np.quantile(t, QUANTILE))) for name, t in times.items()}
            threads = torch.get_num_threads()
            yield Row(problem.label, threads, sizes, low["step"], low["call"], low["torch"])
        count += 1


def report(rows: Sequence[Row], table: cost.Table) -> Table:
    """What each rule loses, by batch."""

    def among(row: Row) -> bool:
        found = row.predicted(table)
        return found is not None and found.kernel_wins_among_others

    def single(row: Row) -> bool:
        found = row.predicted(table)
        return found is not None and found.kernel_wins

    rules: dict[str, Callable[[Row], bool]] = {
        "among others": among,
        "single calls": single,
        "kernels always": lambda _: True,
        "PyTorch always": lambda _: False,
    }
    shown = Table(title=f"{machine.device()}: time lost in sequences, constants {table.source}")
    shown.add_column("batch")
    for name in ("problems", "kernel wins", *rules):
        shown.add_column(name, justify="right")
    for name, some in (("1 to 8", [r for r in rows if r.sizes["B"] <= 8]), ("all", list(rows))):
        best = sum(min(r.step_ns, r.torch_ns) for r in some)
        lost = [
            sum(r.step_ns if rule(r) else r.torch_ns for r in some) / best - 1
            for rule in rules.values()
        ]
        wins = sum(r.step_ns < r.torch_ns for r in some) / len(some)
        shown.add_row(name, str(len(some)), f"{wins:.0%}", *(f"{x:.1%}" for x in lost))
    return shown


def main(
    problems: Annotated[int, typer.Option(help="drawn in all")] = 350,
    seed: Annotated[int, typer.Option(help="of the problems; below 1000 are calibrate's")] = 1000,
    rows: Annotated[Path | None, typer.Option(help="a file of rows: print its table again")] = None,
) -> None:
    table = cost.table()
    if table is None:
        raise SystemExit("study_sequences: got no constants for this CPU, expected AVX2 or AVX-512")
    console = Console(width=130)
    if rows is not None:
        lines = rows.read_text().splitlines()[1:]
        console.print(report([Row(**json.loads(line)) for line in lines], table))
        return
    calibrate.check_machine()
    facts = {"constants": table.source, "threads": torch.get_num_threads()}
    path = results.new_study(HERE / "results", "sequences", **facts)
    console.print(report(list(results.kept(path, measured(seed, problems))), table))
    console.print(str(path))


if __name__ == "__main__":
    typer.run(main)
