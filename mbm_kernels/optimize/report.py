"""What `optimize` did, module by module, and the way back."""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from mbm_kernels.optimize.beside import Beside

COLUMNS = ("module", "was", "now", "backend", "error", "ratio", "reason")
# In the table of text, where the width counts.
SHORT = {
    "torch.nn.": "",
    "mbm_kernels.nn.": "mbm.",
    "mbm_kernels.": "mbm.",
    " + ": "+",
    "BatchNorm2d": "BN",
    "MaxPool2d": "pool",
}
LEAST_WIDTH, MOST_WIDTH = 80, 140


class Change(Protocol):
    """A change of one module that can be undone."""

    name: str

    def why_not_undone(self) -> str | None:
        """What has been done to the module since, if that must be undone first."""

    def undo(self) -> None: ...
    def redo(self) -> None:
        """After `undo`."""


@dataclass(frozen=True)
class Row:
    """One module, or a chain of modules that runs as one.

    name: its path, of a chain that of its convolution. was, now: classes. backend: what runs, where
    sample_input told, else "auto". reason: why it was replaced or kept. error: of the output
    against float64, over the output's largest value. ratio: measured, PyTorch's time over ours.
    """

    name: str
    was: str
    now: str
    backend: str
    reason: str
    error: float | None = None
    ratio: float | None = None


@dataclass
class Report:
    """The rows `replaced` and `kept`; `notes` are of the model as a whole. `revert` undoes it.

    ratio: by policy "measured", PyTorch's time over ours of the whole model on the sample.
    beside: the whole model beside engines, where somebody measured that.
    """

    mode: str
    policy: str
    replaced: list[Row] = field(default_factory=list)
    kept: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ratio: float | None = None
    beside: Beside | None = None
    _changes: list[Change] = field(default_factory=list, repr=False)

    def revert(self) -> None:
        """Makes every module what it was: the same objects, with the parameters of now.

        A second call does nothing.

        Raises:
            RuntimeError: something has changed a module's class since (parametrize, FSDP); then
                nothing is reverted.
        """
        reasons = [f"{c.name}: {r}" for c in self._changes if (r := c.why_not_undone())]
        if reasons:
            raise RuntimeError(
                f"revert: got {'; '.join(reasons)}; expected the modules as optimize left them; "
                "undo that first"
            )
        while self._changes:
            self._changes.pop().undo()

    def to_json(self) -> str:
        """The rows and notes as JSON text."""
        content: dict[str, Any] = {
            "mode": self.mode,
            "policy": self.policy,
            "replaced": [asdict(row) for row in self.replaced],
            "kept": [asdict(row) for row in self.kept],
            "notes": self.notes,
            "ratio": self.ratio,
        }
        if self.beside is not None:
            content["beside"] = self.beside.as_dict()
        return json.dumps(content, indent=2)

    def to_html(self, path: str | Path) -> None:
        """Writes the rows and notes as a page that stands alone."""
        tables = [
            f"<h2>{title}</h2>\n{_html_table(rows)}"
            for title, rows in (("Replaced", self.replaced), ("Kept", self.kept))
            if rows
        ]
        if self.beside is not None:
            tables.append(f"<h2>{html.escape(self.beside.title.capitalize())}</h2>")
            tables.append(_html_lines(self.beside.columns, self.beside.cells()))
            tables += [f"<p>no {html.escape(line)}</p>" for line in _missing(self.beside)]
        notes = "".join(f"<p>{html.escape(note)}</p>\n" for note in self.notes)
        page = _PAGE.format(title=html.escape(self.title), body="\n".join(tables) + notes)
        Path(path).write_text(page, encoding="utf-8")

    @property
    def title(self) -> str:
        """One line on the whole."""
        measured = "" if self.ratio is None else f"; the model measured {self.ratio:.2f}x"
        return (
            f"{len(self.replaced)} replaced, {len(self.kept)} kept; "
            f"mode {self.mode}, policy {self.policy}{measured}"
        )

    def __str__(self) -> str:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        def table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
            found = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
            used = [i for i in range(len(columns)) if any(line[i] for line in lines)]
            for i in used:
                found.add_column(columns[i], overflow="fold", no_wrap=i > 2 and i < 6)
            for line in lines:
                found.add_row(*(Text(line[i]) for i in used))
            return found

        width = shutil.get_terminal_size((100, 24)).columns
        console = Console(width=min(max(width, LEAST_WIDTH), MOST_WIDTH), color_system=None)
        with console.capture() as capture:
            console.print(Text(self.title))
            if self.replaced:
                console.print(table(COLUMNS, [_cells(_short(r)) for r in self.replaced]))
            if self.kept:
                rows = [_short(r) for r in self.kept]
                console.print(table(("kept", "is", "reason"), _grouped(rows)))
            for note in self.notes:
                console.print(Text(note))
            if self.beside is not None:
                console.print(Text(f"\n{self.beside.title}"))
                console.print(table(self.beside.columns, self.beside.cells()))
                for line in _missing(self.beside):
                    console.print(Text(f"no {line}"))
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _short(row: Row) -> Row:
    was, now = row.was, row.now
    for long, short in SHORT.items():
        was, now = was.replace(long, short), now.replace(long, short)
    return replace(row, was=was, now=now)


def _cells(row: Row) -> tuple[str, ...]:
    """A row's texts in the order of COLUMNS."""
    error = "" if row.error is None else f"{row.error:.1e}"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    return row.name, row.was, row.now, row.backend, error, ratio, row.reason


def _grouped(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Names, class and reason; modules of one class that are kept for one reason share a line."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        ratio = "" if row.ratio is None else f" ({row.ratio:.2f}x)"
        groups.setdefault((row.was, row.reason + ratio), []).append(row.name)
    return [("\n".join(names), was, reason) for (was, reason), names in groups.items()]


def _missing(beside: Beside) -> list[str]:
    return [f"{name}: {reason}" for name, reason in beside.missing.items()]


def _html_table(rows: Sequence[Row]) -> str:
    return _html_lines(COLUMNS, [_cells(row) for row in rows])


def _html_lines(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    shown = [line(columns, "th"), *(line(cells, "td") for cells in lines)]
    return "<table>\n" + "\n".join(shown) + "\n</table>"


_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 14px/1.5 sans-serif; margin: 2em; }}
table {{ border-collapse: collapse; }}
th, td {{ border: 1px solid #ccc; padding: 2px 8px; text-align: left; }}
</style></head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
