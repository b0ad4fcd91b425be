"""The progress of a training: a bar by rich on a terminal, else a line now and then."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Report = Callable[[int, dict[str, float]], None]


@contextmanager
def training_progress(
    title: str | None, steps: int, done: int, *, unit: str = "step", stderr: bool = False
) -> Iterator[Report]:
    """Yields a function to call after each step with the steps done and the losses by name.

    No title, no progress.

    Args:
        unit: the name of a step. stderr: where it is written to, else to the standard output.
    """
    if title is None:
        yield lambda step, losses: None
        return
    console = Console(stderr=stderr)
    if not console.is_terminal:
        marks = {done + 1, *(steps * tenth // 10 for tenth in range(1, 11))}

        def line(step: int, losses: dict[str, float]) -> None:
            if step in marks:
                text = f"{title}: {unit} {step}/{steps} {_shown(losses)}".rstrip()
                print(text, file=sys.stderr if stderr else sys.stdout, flush=True)

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=steps, completed=done, losses="")

        def report(step: int, losses: dict[str, float]) -> None:
            bar.update(task, completed=step, losses=_shown(losses))

        yield report


def _shown(losses: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.3f}" for name, value in losses.items())
