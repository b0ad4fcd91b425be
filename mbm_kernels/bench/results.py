"""Results files: one per device and commit, JSON Lines, a head and then one row a line.

Rows of several operations and both heaps merge into the file of their commit; measuring a row again
replaces it, unless the new one is worth less. What is measured with local edits or without
torch.compile goes to a file of its own, `<date>-<sha7>-local.jsonl`, and is no evidence. Every
write goes to a temporary name, is fsynced and renamed, so that a stop at any moment leaves the last
whole file.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from mbm_kernels._core.files import write_atomic
from mbm_kernels.bench import isa, machine

SCHEMA = 2
JSON_SCHEMA = 1  # of older files, .json: without samples, and with ours and ATen's ISA alone
KEY = ("op", "case", "pass", "dtype", "threads", "heap", "l2", "backend", "quick")
LOCAL = "-local"

Row = dict[str, Any]
T = TypeVar("T", bound=Any)


def row_key(row: Row) -> tuple[str, ...]:
    return tuple(json.dumps(row.get(name), sort_keys=True) for name in KEY)


def read(path: Path) -> dict[str, Any]:
    """The head of a results file with its `rows`, of either schema.

    Raises:
        ValueError: when it is not one, or of another schema.
    """
    expected = SCHEMA if path.suffix == ".jsonl" else JSON_SCHEMA
    try:
        if path.suffix == ".jsonl":
            head, *rows = map(json.loads, path.read_text().splitlines() or [""])
            found = {**head, "rows": rows} if isinstance(head, dict) else head
        else:
            found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: got text that is not JSON ({error}); expected a results file; remove it"
        ) from None
    if not isinstance(found, dict) or found.get("schema") != expected:
        schema = found.get("schema") if isinstance(found, dict) else None
        raise ValueError(
            f"{path}: got schema {schema!r}; expected {expected}; measure again with this version"
        )
    return found


def is_local(dirty: bool | None, compiled: bool) -> bool:
    return bool(dirty) or not compiled


def worth(row: Row) -> tuple[bool, int, bool]:
    """Rows of more are not replaced by rows of less: none in doubt, then more processes, then
    engines beside them."""
    return not row.get("doubts"), row.get("n_processes", 1), "engines" in row


def _head(device: str, commit: str | None, local: bool) -> dict[str, Any]:
    """The first line of a results file: what all its rows hold for."""
    return {
        "schema": SCHEMA,
        "device": device,
        "commit": commit,
        "local": local,
        "machine": machine.facts(),
    }


def new_study(base: Path, kind: str, *, go_on: bool = False, **facts: Any) -> Path:
    """Begins `<date>-<sha7>-<kind>.jsonl` of this device with its head; the study appends its rows.

    Args:
        base: the folder of all devices' results.
        go_on: leaves a file of the same name and head as it is, for further rows.
        facts: what the rows hold for, beside machine, commit and ISA.
    """
    device, commit = machine.device(), machine.commit(base.parent)
    head = _head(device, commit, False) | {"isa": isa.record(), **facts}
    path = base / device / f"{datetime.now(UTC):%Y-%m-%d}-{(commit or 'nocommit')[:7]}-{kind}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(head) + "\n"
    if not (go_on and path.exists() and path.read_text().startswith(line)):
        path.write_text(line)
    return path


def kept(path: Path, rows: Iterable[T]) -> Iterator[T]:
    """Passes on each row, a dataclass, once it is a line at the end of the file."""
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()
            yield row


class ResultsFile:
    """The file of this device and commit, made on the first row.

    Args:
        base: the folder of all devices' results; $OUT, where set, is written to instead, without
            a folder for the device.
        commit: of the measured code, None outside git.
        today: in place of today's date, as 2026-11-30.
        device: the folder's name, without it that of this CPU.
        local: whether the code has local edits, or torch.compile is left out.
        isa: what `isa.record` found, of a CPU.
    """

    def __init__(
        self,
        base: Path,
        commit: str | None,
        today: str | None = None,
        device: str | None = None,
        *,
        local: bool = False,
        isa: Mapping[str, Any] | None = None,
    ):
        device = device or machine.device()
        out = os.environ.get("OUT")
        folder = Path(out) if out else base / device
        name = (commit[:7] if commit else "nocommit") + (LOCAL if local else "")
        date = today or datetime.now(UTC).strftime("%Y-%m-%d")
        # A run that passes midnight, or goes on the next day, stays in one file.
        earlier = sorted(folder.glob(f"*-{name}.jsonl")) if commit else []
        self.path = earlier[-1] if earlier else folder / f"{date}-{name}.jsonl"
        self._head = _head(device, commit, local)
        if isa is not None:
            self._head["isa"] = dict(isa)

    def append(self, row: Row) -> str | None:
        """Adds a row, in place of an earlier one with the same `KEY`; or says why it does not.

        The file is read again first: another process may have added rows of the other heap.
        """
        rows = self.rows()
        same = [old for old in rows if row_key(old) == row_key(row)]
        if "wrong" not in row and any(
            worth(old) > worth(row) for old in same if "wrong" not in old
        ):
            return "a row of more processes, with engines, or without doubts, stands there"
        kept = [old for old in rows if row_key(old) != row_key(row)]
        lines = [json.dumps(line, separators=(",", ":")) for line in (self._head, *kept, row)]
        write_atomic(self.path, ("\n".join(lines) + "\n").encode())
        return None

    def rows(self) -> list[Row]:
        found: list[Row] = read(self.path)["rows"] if self.path.exists() else []
        return found
