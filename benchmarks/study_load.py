"""What other processes cost a kernel, and what they cost PyTorch.

    python -m benchmarks.study_load [OP ...] [--busy 0 --busy 2] [--seconds 3]

Beside 0, 1, 2 and 4 processes that never sleep, the kernel (backend "cpu" by name) and the eager
PyTorch baselines are timed in the same rounds by all threads: the median, and the 90th percentile,
which a thread waiting for one that does not run shows first. Cases are the benchmarks' quick ones,
checked by the error rule before. A kernel loses where its median or its 90th percentile is above
the fastest baseline's. Rows go to results/<device>/<date>-<commit>-load.jsonl as they come.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

import mbm_kernels
from mbm_kernels._core import timing
from mbm_kernels._core.op import OPS
from mbm_kernels.bench import calibrate, cli, correct, machine, results
from mbm_kernels.bench.benchmark import Benchmark, Case, prepare

HERE = Path(__file__).resolve().parent
BUSY = (0, 1, 2, 4)
MOST_ROUNDS = 400


@dataclass(frozen=True)
class Loaded:
    """Milliseconds of one case beside `busy` processes; `stock` is the fastest eager form."""

    op: str
    case: str
    pass_: str
    busy: int
    rounds: int
    stock: str
    mbm_median: float
    mbm_p90: float
    stock_median: float
    stock_p90: float

    @property
    def ratios(self) -> tuple[float, float]:
        """PyTorch's time over the kernel's: of the medians, and of the 90th percentiles."""
        return self.stock_median / self.mbm_median, self.stock_p90 / self.mbm_p90


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Within it `count` processes compute without a pause."""
    command = [sys.executable, "-S", "-c", "while True: pass"]
    started = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()


def of_times(
    op: str, case: str, which: str, busy: int, times: Mapping[str, timing.Times]
) -> Loaded:
    """The row of samples in nanoseconds by form, "mbm" and baselines."""
    medians = {name: float(np.median(found)) for name, found in times.items()}
    stock = min((name for name in times if name != "mbm"), key=lambda name: medians[name])
    p90 = {name: float(np.quantile(times[name], 0.9)) for name in ("mbm", stock)}
    return Loaded(
        op,
        case,
        which,
        busy,
        len(times["mbm"]),
        stock,
        medians["mbm"] / 1e6,
        p90["mbm"] / 1e6,
        medians[stock] / 1e6,
        p90[stock] / 1e6,
    )


def measured(
    benchmark: Benchmark, case: Case, which: str, busy: tuple[int, ...], seconds: float
) -> Iterator[Loaded]:
    """A row for each number of busy processes.

    Raises:
        WrongResult: the kernel's result breaks the error rule; it has no speed then.
    """
    correct.check(benchmark, case, which, "cpu")
    inputs = benchmark.inputs(case)
    diff = benchmark.differentiable(inputs)
    forms = {"mbm": benchmark.mbm("cpu")}
    forms |= {
        name: form
        for name, form in benchmark.stock(case).items()
        if which in form.passes and not form.compile
    }
    calls = {name: prepare(form, inputs, diff).call(which) for name, form in forms.items()}
    for count in busy:
        with busy_processes(count):
            times = timing.interleave(calls, seconds, max_rounds=MOST_ROUNDS)
        yield of_times(benchmark.op, case.label, which, count, times)


def report(rows: list[Loaded]) -> Table:
    """One line a case and pass, PyTorch's time over the kernel's by the number of processes."""
    table = Table(title=f"{machine.device()}: PyTorch's time over the kernel's, median / p90")
    for name in ("operation", "case", "pass"):
        table.add_column(name)
    counts = sorted({row.busy for row in rows})
    for count in counts:
        table.add_column(f"{count} busy", justify="right")
    table.add_column("kernel ms", justify="right")
    lines: dict[tuple[str, str, str], dict[int, Loaded]] = {}
    for row in rows:
        lines.setdefault((row.op, row.case, row.pass_), {})[row.busy] = row
    for key, found in lines.items():
        cells = []
        for count in counts:
            if count not in found:
                cells.append("")
                continue
            cell = " / ".join(f"{ratio:.2f}" for ratio in found[count].ratios)
            cells.append(f"[red]{cell}[/red]" if min(found[count].ratios) < 1 else cell)
        medians = " ".join(f"{found[count].mbm_median:.3g}" for count in counts if count in found)
        table.add_row(*key, *cells, medians)
    return table


def main(
    ops: Annotated[list[str] | None, typer.Argument(help="operations; default: all")] = None,
    busy: Annotated[list[int] | None, typer.Option(help="busy processes; default 0 1 2 4")] = None,
    seconds: Annotated[float, typer.Option(help="about how long a row is sampled")] = 3.0,
    rows: Annotated[Path | None, typer.Option(help="a file of rows: print its table again")] = None,
) -> None:
    console = Console(width=150)
    if rows is not None:
        lines = rows.read_text().splitlines()[1:]
        console.print(report([Loaded(**json.loads(line)) for line in lines]))
        return
    calibrate.check_machine()
    facts = {"heap": machine.heap(), "threads": torch.get_num_threads()}
    path = results.new_study(HERE / "results", "load", **facts)
    known = [op for op in OPS if mbm_kernels.backends(op)["cpu"] is None]
    found = []
    with path.open("a") as file:
        for benchmark in cli.load(HERE, ops or None):
            if benchmark.op not in known:
                continue
            for case in benchmark.choose(None, quick=True):
                for which in case.passes:
                    for row in measured(benchmark, case, which, tuple(busy or BUSY), seconds):
                        found.append(row)
                        file.write(json.dumps(asdict(row)) + "\n")
                        file.flush()
            console.print(f"{benchmark.op}: done", style="dim")
    console.print(report(found))
    console.print(str(path))


if __name__ == "__main__":
    typer.run(main)
