"""Results files: one per device and commit, written row by row.

Rows of several operations and both heaps merge into the file of their commit; measuring a row again
replaces it. Every write goes to a temporary name, is fsynced and renamed, so that a stop at any
moment leaves the last whole file.
"""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mbm_kernels._core.files import write_atomic
from mbm_kernels.bench import machine

SCHEMA = 1
KEY = ("op", "case", "pass", "dtype", "threads", "heap", "l2", "backend", "quick")

Row = dict[str, Any]


def row_key(row: Row) -> tuple[str, ...]:
    return tuple(json.dumps(row.get(name), sort_keys=True) for name in KEY)


def read(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        ValueError: when it is not one, or of another schema.
    """
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: got text that is not JSON ({error}); expected a results file; remove it"
        ) from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        schema = found.get("schema") if isinstance(found, dict) else None
        raise ValueError(
            f"{path}: got schema {schema!r}; expected {SCHEMA}; measure again with this version"
        )
    return found


class ResultsFile:
    """The file of this device and commit, made on the first row.

    Args:
        base: the folder of all devices' results; $OUT, where set, is written to instead, without
            a folder for the device.
        commit: of the measured code, None outside git.
        today: in place of today's date, as 2026-11-30.
        device: the folder's name, without it that of this CPU.
    """

    def __init__(
        self, base: Path, commit: str | None, today: str | None = None, device: str | None = None
    ):
        device = device or machine.device()
        out = os.environ.get("OUT")
        folder = Path(out) if out else base / device
        name = commit[:7] if commit else "nocommit"
        date = today or datetime.now(UTC).strftime("%Y-%m-%d")
        # A run that passes midnight, or goes on the next day, stays in one file.
        earlier = sorted(folder.glob(f"*-{name}.json")) if commit else []
        self.path = earlier[-1] if earlier else folder / f"{date}-{name}.json"
        self._head = {
            "schema": SCHEMA,
            "device": device,
            "commit": commit,
            "machine": machine.facts(),
        }

    def append(self, row: Row) -> None:
        """Adds a row, in place of an earlier one with the same `KEY`.

        The file is read again first: another process may have added rows of the other heap.
        """
        rows: list[Row] = read(self.path)["rows"] if self.path.exists() else []
        rows = [old for old in rows if row_key(old) != row_key(row)] + [row]
        text = json.dumps({**self._head, "rows": rows}, indent=1) + "\n"
        write_atomic(self.path, text.encode())

    def rows(self) -> list[Row]:
        return read(self.path)["rows"] if self.path.exists() else []
