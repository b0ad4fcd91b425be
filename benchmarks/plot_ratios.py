"""The README's picture: how much faster `auto` is than PyTorch on drawn problems.

    python -m benchmarks.plot_ratios [ROWS] [--out docs/ratios.svg]

ROWS is a file of benchmarks.study_dispatch; by default the newest one of all machines. For each
operation and pass the point is the median of PyTorch's time over auto's, the thick line reaches
from the first to the last quartile, the thin one from the 5th to the 95th percentile.
"""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from mbm_kernels._core import cost
from mbm_kernels._core.files import write_atomic
from mbm_kernels.bench import calibrate
from mbm_kernels.bench.drawn_times import Timed

HERE = Path(__file__).resolve().parent
COLOURS = {False: "#2166ac", True: "#b2182b"}
PASSES = {False: "inference", True: "training"}
TICKS = (0.5, 1, 2, 4, 8, 16, 32, 64)


def ratios(rows: list[Timed], op: str, training: bool, table: cost.Table) -> "np.ndarray":
    some = [r for r in rows if r.op == op and r.training == training]
    return np.array([r.torch_ns / calibrate.chosen_ns(r, table) for r in some])


def newest() -> Path:
    found = sorted(HERE.glob("results/*/*-dispatch.jsonl"), key=lambda p: p.name)
    if not found:
        raise SystemExit(
            "plot_ratios: got no rows, expected a file of benchmarks.study_dispatch; run that first"
        )
    return found[-1]


def main(
    rows: Annotated[Path | None, typer.Argument(help="of benchmarks.study_dispatch")] = None,
    out: Annotated[Path, typer.Option(help="picture to write")] = HERE.parent / "docs/ratios.svg",
) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "mbm_kernels"  # the same rows give the same file
    from matplotlib import pyplot

    path = rows or newest()
    head = json.loads(path.read_text().splitlines()[0])
    table = cost.of_device(head["device"])
    timed = calibrate.read_rows(path)
    lines = [
        (op, training, found)
        for op in dict.fromkeys(r.op for r in timed)
        for training in (False, True)
        if len(found := ratios(timed, op, training, table))
    ]
    figure, axes = pyplot.subplots(figsize=(8.2, 0.27 * len(lines) + 1.1))
    for y, (_, training, found) in enumerate(reversed(lines)):
        low, first, middle, last, high = np.percentile(found, (5, 25, 50, 75, 95))
        colour = COLOURS[training]
        axes.plot([low, high], [y, y], color=colour, linewidth=1)
        axes.plot([first, last], [y, y], color=colour, linewidth=4, solid_capstyle="butt")
        axes.plot(middle, y, "o", color="white", markeredgecolor=colour, markersize=6)
        axes.text(1.01, y, f"{middle:.2f}", transform=axes.get_yaxis_transform(), va="center")
    axes.set_xscale("log", base=2)
    ticks = [t for t in TICKS if t <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.axvline(1, color="black", linewidth=0.8)
    names = [f"{op}, {PASSES[training]}" for op, training, _ in reversed(lines)]
    axes.set_yticks(range(len(lines)), names)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel(f"PyTorch's time over auto's, {len(timed)} drawn problems, {head['device']}")
    axes.set_title("median", loc="right", fontsize=10)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".part.svg")
    figure.savefig(partial, bbox_inches="tight", metadata={"Date": None})
    write_atomic(out, partial.read_bytes())
    partial.unlink()
    print(out)


if __name__ == "__main__":
    typer.run(main)
