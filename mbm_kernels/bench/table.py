"""Rows as a table: for the terminal, and as markdown between the README's markers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mbm_kernels._core.files import write_atomic
from mbm_kernels.bench import engines_table, isa, statistics
from mbm_kernels.bench.results import Row
from mbm_kernels.bench.units import milliseconds, short_pass

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NARROW, MEDIUM, WIDE = 92, 118, 150  # terminal columns from which more is shown
COLOURS = {"FAST": "green", "SLOW": "red", "SAME": "blue", "AMBG": "yellow"}
# Rows of schema 1 have these, with another meaning of "same": it was all that is neither.
FORMER = {"faster": "FAST", "slower": "SLOW", "same": "AMBG"}
README_HEAP, README_THREADS = "warm", 2


def console_for_rows() -> Console:
    """The terminal, or a file or pipe as wide as the widest table."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDE)


def mebibytes(value: int | None) -> str:
    if value is None:
        return "?"
    size = value / 2**20
    return "<1" if size < 1 else f"{size:,.0f}"


def _memory(row: Row) -> str:
    """Peak memory beyond the results, which every form has to allocate."""
    shown = []
    for name in ("mbm", row["stock_form"]):
        peak = row["peak_extra_bytes"][name]
        shown.append(mebibytes(None if peak is None else max(0, peak - row["result_bytes"][name])))
    return " / ".join(shown)


def _share(row: Row) -> str:
    """Over 110 % the limit is wrong for the row, which is then in doubt: not shown."""
    share = row.get("limit", {}).get("share", 0.0)
    return f"{share:.0%}" if 0 < share <= statistics.MOST_SHARE else ""


def _others(row: Row) -> str:
    others = [f"{n} {r:.2f}x" for n, r in row["ratios"].items() if n != row["stock_form"]]
    return ", ".join(others + [f"no {name}" for name in row["unavailable"]])


def _order(row: Row) -> tuple[Any, ...]:
    return (row["op"], row["heap"], -row["threads"])


def verdict(row: Row) -> str:
    said: str = row["verdict"]
    return FORMER.get(said, said)


def interval(rows: Sequence[Row]) -> str:
    """What the 95 % intervals of these rows cover."""
    counts = sorted({row.get("n_processes", 1) for row in rows if "wrong" not in row} or {1})
    if counts == [1]:
        return (
            "the bootstrap interval is of the rounds within one process, and leaves out what "
            "another process would find"
        )
    count = "-".join(str(n) for n in {counts[0]: 0, counts[-1]: 0})
    some = " (of the rows with 1: of rounds within that process)" if counts[0] == 1 else ""
    return f"the interval is of a bootstrap over {count} processes and the rounds of each{some}"


def print_rows(rows: Sequence[Row], console: Console | None = None) -> None:
    """One table for each operation and heap; narrow terminals get fewer columns."""
    console = console or console_for_rows()
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["heap"]), []).append(row)
    for (op, heap), group in groups.items():
        console.print(_table(op, heap, group, console.width))
        engines_table.print_rows(group, console)
    if rows:
        console.print(
            "[dim]ratio = best stock form / mbm in the same rounds, above 1: mbm is faster; "
            f"{interval(rows)}. FAST, SLOW: it clears what mbm beside itself shows, SAME: it lies "
            "inside, AMBG: neither, or the times are in doubt. thr: threads. limit: share of the "
            "machine's measured arithmetic, cache or memory rate. "
            "+MiB: peak extra memory of a call beyond its results.[/dim]",
            highlight=False,
        )


def _table(op: str, heap: str, rows: Sequence[Row], width: int) -> Table:
    table = Table(
        title=f"{op}, {heap} heap", title_justify="left", box=None, padding=(0, 1), pad_edge=False
    )
    table.add_column("case", min_width=16, overflow="fold")
    table.add_column("pass", no_wrap=True)
    table.add_column("thr", no_wrap=True)
    if width >= NARROW:
        table.add_column("backend", no_wrap=True)
    table.add_column("mbm ms", justify="right", no_wrap=True)
    table.add_column("best stock", min_width=8)
    for name in ("stock ms", "ratio", "95 %"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)  # the verdict
    beside = engines_table.any_in(rows)
    if beside:
        table.add_column("fastest engine", min_width=12)
        table.add_column("ms", justify="right", no_wrap=True)
        table.add_column("ratio", justify="right", no_wrap=True)
    if width >= MEDIUM:
        table.add_column("limit", justify="right", no_wrap=True)
        table.add_column("+MiB mbm / stock", justify="right", no_wrap=True)
    others = width >= WIDE and not beside
    if others:
        table.add_column("other forms")
    for row in rows:
        head = [escape(row["case"]), short_pass(row["pass"]), str(row["threads"])]
        if width >= NARROW:
            head.append(row["backend"])
        if "wrong" in row:
            table.add_row(*head, "[red]WRONG[/red]", "see below")
            continue
        colour = COLOURS[verdict(row)]
        cells = [
            *head,
            milliseconds(row["mbm_ms"]),
            row["stock_form"],
            milliseconds(row["stock_ms"]),
            f"[{colour}]{row['ratio']:.2f}x[/{colour}]",
            f"{row['ratio_lo']:.2f}-{row['ratio_hi']:.2f}",
            f"[{colour}]{verdict(row)}[/{colour}]",
        ]
        if beside:
            name, ms, ratio = engines_table.fastest(row)
            cells += [name, ms, f"{ratio}x" if ratio else ""]
        if width >= MEDIUM:
            cells += [_share(row), _memory(row)]
        if others:
            cells.append(_others(row))
        table.add_row(*cells)
    return table


def markdown(found: dict[str, Any], path: str) -> str:
    """The README's table of a results file: the warm heap on 2 threads, losing rows too.

    Args:
        found: the file's content.
        path: where the README's reader finds it.
    """
    machine, commit = found["machine"], found["commit"]
    rows = [
        row
        for row in found["rows"]
        if row["heap"] == README_HEAP
        and row["threads"] == README_THREADS
        and not row["quick"]
        and "wrong" not in row
    ]
    beside = engines_table.any_in(rows)
    lines = [
        f"{machine['cpu']} ({found['device']}), {README_THREADS} threads, {README_HEAP} heap, "
        f"torch {machine['versions']['torch']}, float32, commit {(commit or 'none')[:7]}"
        f"{_isas(found)}. Ratio: best stock form / mbm_kernels, medians of interleaved rounds, and "
        f"its 95 % interval; below 1 stock is faster. {_capitalised(interval(rows))}. MiB: peak "
        "extra memory of a call beyond its results. One thread, the default heap and every stock "
        f"form: [{path}]({path})." + engines_table.NOTE * beside,
        "",
        "| operation | shape | pass | backend | best stock form | stock ms | mbm ms | ratio | | "
        "MiB mbm / stock |" + engines_table.COLUMNS * beside,
        "|---|---|---|---|---|--:|--:|--:|---|--:|" + engines_table.RULE * beside,
    ]
    for row in sorted(rows, key=_order):
        cells = [
            row["op"],
            row["case"],
            row["pass"],
            row["backend"],
            row["stock_form"],
            milliseconds(row["stock_ms"]),
            milliseconds(row["mbm_ms"]),
            f"{row['ratio']:.2f} ({row['ratio_lo']:.2f} to {row['ratio_hi']:.2f})",
            verdict(row),
            _memory(row),
        ]
        if beside:
            cells += [*engines_table.fastest(row), engines_table.error_pair(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def _isas(found: dict[str, Any]) -> str:
    """The ISA of every library, where the file records them."""
    if "isa" not in found:
        return ""
    names = " and ".join(isa.LIBRARIES.values())
    return f", {found['isa']['mbm']} in mbm_kernels, {names}"


def replace_between_markers(text: str, table: str) -> str:
    """`text` with what stands between its two markers replaced.

    Raises:
        ValueError: when the markers are missing, doubled or in the wrong order.
    """
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin or text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(
            f"README: got no single pair of markers; expected {BEGIN} and then {END}; "
            "put both where the table belongs"
        )
    return f"{text[: begin + len(BEGIN)]}\n{table}\n{text[end:]}"


def update_readme(readme: Path, found: dict[str, Any], results: Path) -> None:
    path = results.resolve()
    root = readme.resolve().parent
    link = str(path.relative_to(root)) if path.is_relative_to(root) else path.name
    text = replace_between_markers(readme.read_text(), markdown(found, link))
    write_atomic(readme, text.encode())
