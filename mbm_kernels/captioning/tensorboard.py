"""The losses of a run for TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mbm_kernels.captioning.history import History

FOLDER = "tensorboard"  # in the run's folder


def writer_class() -> Any:
    """torch's SummaryWriter.

    Raises:
        ImportError: the package tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            f"tensorboard: got none that can be imported ({error}), expected one; "
            "`pip install tensorboard`, or leave --tensorboard out"
        ) from error
    return SummaryWriter


@contextmanager
def board(run: Path, history: History, step: int) -> Iterator[Callable[[], None]]:
    """Yields a function that writes what is new in a history since step ``step``.

    What an earlier process wrote of later steps, which are taken again, is no longer shown.
    """
    writer = writer_class()(str(run / FOLDER), purge_step=step + 1)
    written = {"train": len(history.train), "validation": len(history.validation)}

    def write() -> None:
        for group in written:
            rows = getattr(history, group)
            for row in rows[written[group] :]:
                for name, value in row.items():
                    if name != "step":
                        writer.add_scalar(f"{group}/{name}", value, int(row["step"]))
            written[group] = len(rows)

    try:
        yield write
    finally:
        writer.close()
