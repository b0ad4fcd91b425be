"""Whole models of others, before and after `optimize`: `python -m tests.docs.models`.

From the newest files that `python -m benchmarks.zoo --save` wrote for each device and number of
threads; of a row measured twice the later one stands.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import zoo
from tests.docs import pages

RESULTS = Path(zoo.__file__).parent / "results"
FEWER = 0.98  # a ratio below it is a loss

TEXT = """# Models that others wrote

Written by `python -m tests.docs.models` from the results that `python -m benchmarks.zoo --save`
commits. torchvision's and timm's models have random weights; those of speech, time series and
tables are written from their papers with torch's own modules ([benchmarks](benchmarks.md)).

Each model ran as it is and as `optimize` makes it, all forms interleaved in one process on a heap
that stays warm. *ms*: the median of PyTorch's fastest form, NCHW or channels_last. *auto*,
*measured*: that time over the time of our faster layout by that policy; *frozen*: likewise by
`auto` with `freeze=True`, which takes no hash of the weights at each call. Above 1 `optimize` made
the model faster, and **bold** is a loss beyond 2 %. Training is a forward and a backward. Before
any time is taken, outputs and gradients are held to PyTorch's in float64 by `check_parity`.

*fastest engine*: ONNX Runtime, OpenVINO or MNN, and its time over that of *frozen*, for an engine's
weights are constants too; of rows from before there was that, over that of *auto*.

*replaced*: how many of the modules that have a counterpart `auto` replaced, and why it kept others.
`measured` times the whole model at last and puts everything back unless that is faster; a model of
which nothing is replaced is PyTorch's own, and counts as that.

{tables}"""


def files() -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The head and the rows of each device and number of threads, of each row the newest."""
    for folder in sorted(RESULTS.iterdir()):
        by_threads: dict[int, tuple[dict[str, Any], dict[Any, dict[str, Any]]]] = {}
        found = [
            (path.name[:10], [json.loads(line) for line in path.read_text().splitlines()])
            for path in sorted(folder.glob("*-zoo.jsonl"))
        ]
        # By day; within one, by when rows were taken, which older files do not say.
        found.sort(key=lambda dated: (dated[0], dated[1][-1].get("time", "")))
        for _, (head, *rows) in found:
            _, known = by_threads.get(head["threads"], (None, {}))
            known |= {(row["mode"], row["model"], row["B"]): row for row in rows}
            by_threads[head["threads"]] = (head, known)
        for head, known in by_threads.values():
            yield head, list(known.values())


def ratio(value: float) -> str:
    return f"**{value:.2f}**" if value < FEWER else f"{value:.2f}"


def line(row: dict[str, Any]) -> list[str]:
    """The cells of a row."""
    cells = zoo.cells(row)
    if "ms" not in row:
        return cells + [""] * (len(zoo.COLUMNS) - len(cells))
    model, batch, replaced, form, ms, *_, engine = cells
    ratios = zoo.ratios(row)
    found = [*(ratio(ratios[form]) if form in ratios else "" for form in zoo.FORMS), engine]
    why = "; ".join(f"{count} {reason}" for reason, count in row.get("why", {}).items())
    return [model, batch, f"{replaced} ({why})" if why else replaced, form, ms, *found]


def tables() -> Iterator[str]:
    for head, rows in files():
        one = head["threads"] == 1
        clock = "CPU time of one thread" if one else f"{head['threads']} threads"
        yield f"## {head['device']}, {clock}\n\n"
        yield f"torch {head['machine']['versions']['torch']}, commit {str(head['commit'])[:7]}.\n\n"
        for mode in zoo.MODES:
            found = [line(row) for row in rows if row["mode"] == mode]
            if found:
                yield f"### {mode.capitalize()}\n\n{pages.table(zoo.COLUMNS, found)}\n"


def page() -> str:
    return TEXT.format(tables="".join(tables())).rstrip() + "\n"


if __name__ == "__main__":
    pages.write("models.md", page)
