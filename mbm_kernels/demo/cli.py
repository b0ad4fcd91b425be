"""`mbm-kernels caption` with the demo, which also uses what is above captioning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mbm_kernels.captioning import data
from mbm_kernels.captioning.cli import Attention, app
from mbm_kernels.captioning.options import Data, Limit, Root, Seed, Steps
from mbm_kernels.captioning.presets import preset


@app.command()
def demo(
    name: Data = "scenes",
    out: Annotated[Path | None, typer.Option(help="Folder; default out/demo/<data>.")] = None,
    attention: Attention = None,
    steps: Steps = None,
    seed: Seed = 0,
    limit: Limit = None,
    data_root: Root = None,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Also time torch.compile of stock.")
    ] = True,
    alone: Annotated[
        bool, typer.Option("--alone", help="Also train the student without a teacher.")
    ] = False,
) -> None:
    """Train, score and time captioners, search and matching of pairs; write a report."""
    from mbm_kernels.demo import run as whole

    preset(name)
    if data_root is None:
        data.fetch(name, progress=typer.echo)
    whole.run(
        name,
        out=out,
        root=data_root,
        attention=attention or "additive",
        seed=seed,
        limit=limit,
        steps=steps,
        compiled=compiled,
        alone=alone,
    )


__all__ = ["app"]
