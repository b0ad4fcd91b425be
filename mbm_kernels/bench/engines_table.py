"""What tables say of inference engines: the fastest beside each row, and all of them below."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mbm_kernels import engines
from mbm_kernels.bench.results import Row
from mbm_kernels.bench.units import milliseconds, short_pass

# Of RESULTS.md
COLUMNS = " fastest engine | its ms | its ratio | errors engine / mbm |"
RULE = "---|--:|--:|--:|"
NOTE = (
    " Its ratio: time of the fastest inference engine / mbm_kernels in the same rounds; errors are "
    "against float64, over the largest value; every engine is in the file."
)


def any_in(rows: Sequence[Row]) -> bool:
    return any(row.get("engine") for row in rows)


def fastest(row: Row) -> tuple[str, str, str]:
    """Of the fastest engine: its name, with what is to be said of its error, ms and ratio."""
    name = row.get("engine")
    if name is None:
        return "", "", ""
    found = row["engines"][name]
    said = [name, *filter(None, [engines.remark(found["error"], row["errors"].get("mbm"))])]
    return ", ".join(said), milliseconds(found["ms"]), f"{found['ratio']:.2f}"


def error_pair(row: Row) -> str:
    """Of the fastest engine and of mbm."""
    if not row.get("engine"):
        return ""
    return f"{_error(row['engines'][row['engine']])} / {row['errors'].get('mbm', 0.0):.1e}"


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """The engines of rows that were measured with some, and why others were not."""
    if any(row.get("engines") for row in rows):
        console.print(_table(rows))
    for line in _missing(rows):
        console.print(f"[dim]{escape(line)}[/dim]", soft_wrap=True, highlight=False)


def _table(rows: Sequence[Row]) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("forward beside engines", min_width=16, overflow="fold")
    for name in ("thr", "engine", "version"):
        table.add_column(name, no_wrap=name != "engine")
    for name in ("ms", "ratio", "95 %", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("errors of mbm, PyTorch")
    for row in rows:
        head = [escape(row["case"]), str(row["threads"])]
        for name, found in sorted(row.get("engines", {}).items(), key=lambda item: item[1]["ms"]):
            remark = engines.remark(found["error"], row["errors"].get("mbm"))
            errors = [row["errors"].get(form) for form in ("mbm", row["stock_form"])]
            table.add_row(
                *head,
                name,
                found["version"].split("-")[0],
                milliseconds(found["ms"]),
                f"{found['ratio']:.2f}x",
                f"{found['ratio_lo']:.2f}-{found['ratio_hi']:.2f}",
                _error(found),
                remark or ", ".join(f"{e:.1e}" for e in errors if e is not None),
            )
            head = ["", ""]
    return table


def _error(found: dict[str, Any]) -> str:
    return "" if found["error"] is None else f"{found['error']:.1e}"


def _missing(rows: Sequence[Row]) -> list[str]:
    """Lines "<reason>: <engines>, of <rows>": a reason once."""
    whose: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for row in rows:
        for name, reason in row.get("no_engines", {}).items():
            names, cases = whose.setdefault(reason, ({}, {}))
            names[name] = None
            cases[f"{row['case']} {short_pass(row['pass'])}"] = None
    return [
        f"no {', '.join(names)}: {reason} ({len(cases)} of the rows)"
        if len(cases) < len({(r["case"], r["pass"]) for r in rows})
        else f"no {', '.join(names)}: {reason}"
        for reason, (names, cases) in whose.items()
    ]
