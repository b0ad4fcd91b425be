"""The progress bar of a training, by rich; silent where there is no title."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
def training_progress(title: str | None, steps: int, done: int) -> Iterator[Report]:
    """Yields a function to call after each step with the steps done and the losses by name."""
    if title is None:
        yield lambda step, losses: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(title, total=steps, completed=done, losses="")

        def report(step: int, losses: dict[str, float]) -> None:
            shown = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
            bar.update(task, completed=step, losses=shown)

        yield report
