"""Rows as a table: for the terminal, and as markdown between the README's markers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mbm_kernels import engines
from mbm_kernels._core.files import write_atomic
from mbm_kernels.bench import isa, statistics
from mbm_kernels.bench.benchmark import FORWARD
from mbm_kernels.bench.results import Row

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NARROW, MEDIUM, WIDE = 92, 118, 150  # terminal columns from which more is shown
COLOURS = {"FAST": "green", "SLOW": "red", "SAME": "blue", "AMBG": "yellow"}
# Rows of schema 1 have these, with another meaning of "same": it was all that is neither.
FORMER = {"faster": "FAST", "slower": "SLOW", "same": "AMBG"}
ENGINE_COLUMNS = " fastest engine | its ms | its ratio | errors engine / mbm |"
ENGINE_NOTE = (
    " Its ratio: time of the fastest inference engine / mbm_kernels in the same rounds; errors are "
    "against float64, over the largest value; every engine is in the file."
)
README_HEAP, README_THREADS = "warm", 2


def console_for_rows() -> Console:
    """The terminal, or a file or pipe as wide as the widest table."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDE)


def milliseconds(value: float) -> str:
    """Milliseconds in three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def mebibytes(value: int | None) -> str:
    if value is None:
        return "?"
    size = value / 2**20
    return "<1" if size < 1 else f"{size:,.0f}"


def short_pass(name: str) -> str:
    return "fwd" if name == FORWARD else "fwd+bwd"


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


def has_engine(rows: Sequence[Row]) -> bool:
    return any(row.get("engine") for row in rows)


def fastest_engine(row: Row) -> tuple[str, str, str]:
    """Of the fastest engine: its name, with what is to be said of its error, ms and ratio."""
    name = row.get("engine")
    if name is None:
        return "", "", ""
    found = row["engines"][name]
    said = engines.remark(found["error"], row["errors"].get("mbm"))
    shown = f"{name} {found['version'].split('-')[0]}" + (f", {said}" if said else "")
    return shown, milliseconds(found["ms"]), f"{found['ratio']:.2f}"


def engines_in_words(row: Row) -> list[str]:
    """Each engine's ratio and error, then what did not run, and why."""
    said = []
    for name, found in row.get("engines", {}).items():
        error = "" if found["error"] is None else f", error {found['error']:.1e}"
        said.append(f"{name} {found['version']}: {found['ratio']:.2f}x{error}")
    return said + [f"no {name}: {why}" for name, why in row.get("no_engines", {}).items()]


def errors_in_words(row: Row) -> str:
    return ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())


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
        for line in _engine_lines(group):
            console.print(f"[dim]{escape(line)}[/dim]", soft_wrap=True, highlight=False)
    if rows:
        console.print(
            "[dim]ratio = best stock form / mbm in the same rounds, above 1: mbm is faster; "
            f"{interval(rows)}. FAST, SLOW: it clears what mbm beside itself shows, SAME: it lies "
            "inside, AMBG: neither, or the times are in doubt. thr: threads. limit: share of the "
            "machine's measured arithmetic, cache or memory rate. "
            "+MiB: peak extra memory of a call beyond its results.[/dim]",
            highlight=False,
        )


def _engine_lines(rows: Sequence[Row]) -> list[str]:
    """Of each row that was measured with engines, all of them; what all rows say alike, once."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        if "engines" in row:
            said = "; ".join(engines_in_words(row))
            if row["errors"]:
                said += f"; errors of PyTorch's forms and ours: {errors_in_words(row)}"
            what = f"{row['case']} {short_pass(row['pass'])}, {row['threads']} thr"
            lines.setdefault(said, []).append(what)
    return [f"{', '.join(dict.fromkeys(whats))}: {said}" for said, whats in lines.items()]


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
    beside = has_engine(rows)
    if beside:
        table.add_column("fastest engine", min_width=12)
        table.add_column("ms", justify="right", no_wrap=True)
        table.add_column("ratio", justify="right", no_wrap=True)
    if width >= MEDIUM:
        table.add_column("limit", justify="right", no_wrap=True)
        table.add_column("+MiB mbm / stock", justify="right", no_wrap=True)
    if width >= WIDE:
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
            name, ms, ratio = fastest_engine(row)
            cells += [name, ms, f"{ratio}x" if ratio else ""]
        if width >= MEDIUM:
            cells += [_share(row), _memory(row)]
        if width >= WIDE:
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
    beside = has_engine(rows)
    lines = [
        f"{machine['cpu']} ({found['device']}), {README_THREADS} threads, {README_HEAP} heap, "
        f"torch {machine['versions']['torch']}, float32, commit {(commit or 'none')[:7]}"
        f"{_isas(found)}. Ratio: best stock form / mbm_kernels, medians of interleaved rounds, and "
        f"its 95 % interval; below 1 stock is faster. {_capitalised(interval(rows))}. MiB: peak "
        "extra memory of a call beyond its results. One thread, the default heap and every stock "
        f"form: [{path}]({path})." + ENGINE_NOTE * beside,
        "",
        "| operation | shape | pass | backend | best stock form | stock ms | mbm ms | ratio | | "
        "MiB mbm / stock |" + ENGINE_COLUMNS * beside,
        "|---|---|---|---|---|--:|--:|--:|---|--:|" + "---|--:|--:|--:|" * beside,
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
            cells += [*fastest_engine(row), _error_pair(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _error_pair(row: Row) -> str:
    """Of the fastest engine and of mbm."""
    if not row.get("engine"):
        return ""
    pair = (row["engines"][row["engine"]]["error"], row["errors"].get("mbm"))
    return " / ".join("" if error is None else f"{error:.0e}" for error in pair)


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
