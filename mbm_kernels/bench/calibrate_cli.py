"""The command `mbm-kernels calibrate`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mbm_kernels._core import cost, processor
from mbm_kernels.bench import calibrate as calibration
from mbm_kernels.bench.drawn_times import Timed

Ops = Annotated[list[str] | None, typer.Option("--op", help="Repeatable; without it all.")]
Seconds = Annotated[
    float, typer.Option("--seconds", min=5, help="Of timing problems of each operation.")
]
Seed = Annotated[
    int, typer.Option("--seed", min=0, max=999, help="Of the problems; the studies' are from 1000.")
]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="File to write; without it this machine's in the cache folder."),
]
Rows = Annotated[
    list[Path] | None,
    typer.Option("--rows", help="Fit to these files of timed problems, and time none. Repeatable."),
]
Keep = Annotated[
    Path | None, typer.Option("--keep", help="JSON Lines file to add the timed problems to.")
]


def _add(keep: Path, row: Timed) -> None:
    """Appends a row to a file, at once: PyTorch's own kernels may crash or hang on a later one."""
    with keep.open("a") as file:
        file.write(json.dumps(row.as_dict()) + "\n")


def calibrate(
    op: Ops = None,
    seconds: Seconds = 60.0,
    seed: Seed = 0,
    out: Out = None,
    rows: Rows = None,
    keep: Keep = None,
) -> None:
    """Measure this CPU, so that "auto" chooses by it from now on.

    Problems drawn at random are timed by the kernels and by PyTorch, with all threads and with one,
    in inference and in training; constants of the cost models are fitted to the times. Let nothing
    else run meanwhile. Delete the file to return to the constants of the package.
    """
    console = Console()
    unknown = sorted(set(op or ()) - set(calibration.DRAWS))
    if unknown:
        known = ", ".join(calibration.DRAWS)
        raise typer.BadParameter(f"got {', '.join(unknown)}, expected some of {known}")
    calibration.check_machine()
    path = out or cost.user_folder() / f"{processor.name()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(path.read_text()) if path.exists() else None
    if rows:
        timed = [row for file in rows for row in calibration.read_rows(file)]
        timed = [row for row in timed if not op or row.op in op]
    else:
        chosen = op or list(calibration.DRAWS)
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task("", total=len(chosen) * seconds)

            def note(row: Timed, count: int) -> None:
                done = min(progress.tasks[0].elapsed or 0.0, len(chosen) * seconds)
                progress.update(bar, completed=done, description=f"{row.op}: {count} problems")
                if keep is not None:
                    _add(keep, row)

            timed = calibration.time_all(chosen, seconds, seed, note)
    found = calibration.content(timed, kept)
    calibration.write(path, found)
    constants = cost.of_content(found, str(path))
    table = Table("operation", "problems", "kernel wins", "auto takes it", "auto loses")
    for name, row in calibration.quality(timed, constants).items():
        shares = (row["kernel_wins"], row["taken"])
        table.add_row(
            name, str(row["problems"]), *(f"{x:.0%}" for x in shares), f"{row['regret']:.1%}"
        )
    console.print(table)
    console.print(
        "auto loses: of the time of these problems, against always choosing right; they are those "
        "of the fit."
    )
    console.print(f"constants: {path}")
