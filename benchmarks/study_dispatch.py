"""How much time `auto` loses against always choosing right, on problems that no fit saw.

    python -m benchmarks.study_dispatch [OP ...] [--problems 300] [--seed 1000]

Problems are drawn as for `mbm-kernels calibrate`, whose seeds are below 1000, and timed in the same
rounds by the kernel and by the torch backend, by all threads and by one, in inference and in
training. The torch backend is timed twice: choosing between these two at random is what the machine
itself loses (A/A). Rows are written as they come, into
results/<device>/<date>-<commit>-dispatch.jsonl.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from mbm_kernels._core import cost
from mbm_kernels.bench import calibrate, machine, results
from mbm_kernels.bench.drawn_times import Timed, measured

HERE = Path(__file__).resolve().parent


def report(rows: list[Timed], constants: cost.Table) -> Table:
    """One line for each operation and pass."""
    table = Table(title=f"{machine.device()}: auto on drawn problems, constants {constants.source}")
    for name in ("operation", "pass"):
        table.add_column(name)
    names = ("problems", "kernel wins", "auto takes it", "auto loses", "A/A loses")
    for name in (*names, "auto over torch", "best over torch", "worst over 100 us", "below 0.92"):
        table.add_column(name, justify="right")
    for training in (False, True):
        some = [r for r in rows if r.training == training]
        for op, found in calibrate.quality(some, constants).items():
            both = [(r.torch_ns, r.again_ns) for r in some if r.op == op and r.again_ns]
            noise = sum(a + b for a, b in both) / 2 / sum(min(p) for p in both) - 1 if both else 0.0
            table.add_row(
                op,
                "training" if training else "inference",
                str(found["problems"]),
                f"{found['kernel_wins']:.0%}",
                f"{found['taken']:.0%}",
                f"{found['regret']:.1%}",
                f"{noise:.1%}",
                f"{found['over_torch']:.2f}",
                f"{found['best_over_torch']:.2f}",
                f"{found['least_ratio']:.2f}",
                str(found["below"]),
            )
    return table


def markdown(rows: list[Timed], constants: cost.Table) -> str:
    """The README's table: PyTorch's time over auto's, and what auto loses."""
    lines = [
        "| operation | inference | training | auto loses |",
        "|---|---|---|---|",
    ]
    whole = calibrate.quality(rows, constants)
    passes = [
        calibrate.quality([r for r in rows if r.training == training], constants)
        for training in (False, True)
    ]
    for op, found in whole.items():
        ratios = [f"{p[op]['over_torch']:.2f}" if op in p else "" for p in passes]
        lines.append(f"| `{op}` | {' | '.join(ratios)} | {found['regret']:.1%} |")
    return "\n".join(lines)


def main(
    ops: Annotated[list[str] | None, typer.Argument(help="operations; default: all")] = None,
    problems: Annotated[int, typer.Option(help="drawn for each operation")] = 300,
    seed: Annotated[int, typer.Option(help="of the problems; below 1000 are calibrate's")] = 1000,
    rows: Annotated[Path | None, typer.Option(help="a file of rows: print its table again")] = None,
    readme: Annotated[bool, typer.Option("--readme", help="print the README's table")] = False,
) -> None:
    constants = cost.table()
    if constants is None:
        raise SystemExit("study_dispatch: got no constants for this CPU, expected AVX2 or AVX-512")
    console = Console(width=150)
    if rows is not None:
        timed = calibrate.read_rows(rows)
        console.print(markdown(timed, constants) if readme else report(timed, constants))
        return
    calibrate.check_machine()
    facts = {"constants": constants.source, "threads": torch.get_num_threads()}
    path = results.new_study(HERE / "results", "dispatch", **facts)
    found: list[Timed] = []
    for op in ops or calibrate.DRAWS:
        found += results.kept(path, measured(op, seed=seed, most=problems, twice=True))
        console.print(f"{op}: done", style="dim")
    console.print(markdown(found, constants) if readme else report(found, constants))
    console.print(str(path))


if __name__ == "__main__":
    typer.run(main)
