"""What the commands on captioned data share: options, the data they name, and the last line."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mbm_kernels.captioning import data
from mbm_kernels.captioning.data import CaptionSet
from mbm_kernels.captioning.fit import History

Data = Annotated[str, typer.Option("--data", help="A built-in name or the path of captions.")]
Images = Annotated[
    Path | None, typer.Option("--images", help="What the image names of a path are relative to.")
]
Root = Annotated[Path | None, typer.Option("--root", help="Folder of a built-in set.")]
Limit = Annotated[int | None, typer.Option("--limit", help="First pictures of each split only.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the data, the weights and the order.")]
Layers = Annotated[str, typer.Option("--layers", help="mbm or stock.")]
Out = Annotated[Path, typer.Option("--out", "--run", help="Folder of the checkpoints.")]
Beam = Annotated[int, typer.Option("--beam", help="Hypotheses per picture; 1 is greedy.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Optimiser steps, else the preset's.")]
Rate = Annotated[float | None, typer.Option("--learning-rate", help="Peak learning rate.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the latest checkpoint.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def load(
    name: str,
    image_size: int,
    *,
    seed: int,
    root: Path | None,
    limit: int | None,
    images: Path | None,
    to_stderr: bool = True,
) -> dict[str, CaptionSet]:
    """The splits that the options name; what is said of data of one's own is echoed."""
    return data.load(
        name,
        seed=seed,
        root=root,
        image_size=image_size,
        limit=limit,
        images=images,
        progress=partial(typer.echo, err=to_stderr),
    )


def check_splits(asked: list[str] | None, sets: dict[str, CaptionSet]) -> list[str]:
    """Those asked for, else all but train.

    Raises:
        ValueError: for one that the data does not have.
    """
    for one in asked or ():
        if one not in sets:
            raise ValueError(f"split: got {one!r}, expected one of {sorted(sets)}")
    return asked or [one for one in sets if one != "train"]


def as_table(scores: dict[str, dict[str, float]]) -> str:
    """What `metrics.score` gave for each split, in aligned columns; exact match in %."""
    names = ("exact %", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D")
    lines = [["", *names]]
    for split, values in scores.items():
        exact, *overlaps, cider = values.values()
        lines.append([split, *(f"{x:.1f}" for x in (100 * exact, *overlaps)), f"{cider:.2f}"])
    width = max(len(line[0]) for line in lines)
    return "\n".join(
        line[0].ljust(width) + "".join(cell.rjust(9) for cell in line[1:]) for line in lines
    )


def report(history: History, run: Path) -> None:
    """The line that ends a training."""
    last = history.train[-1]
    typer.echo(f"step {last['step']:.0f}, loss {last['loss']:.4f}, checkpoints in {run}")
