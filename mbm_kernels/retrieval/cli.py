"""`mbm-kernels retrieve`: train and score two towers, index a folder of images, search it.

Bad input raises; the caller turns that into one line and an exit status.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import torch
import typer

from mbm_kernels.captioning import checkpoint, data
from mbm_kernels.captioning.data import CaptionSet, WordTokenizer
from mbm_kernels.captioning.fit import History
from mbm_kernels.captioning.kinds import MULTIMODAL, TWO_TOWER
from mbm_kernels.captioning.pictures import read_picture
from mbm_kernels.retrieval import index as indexes
from mbm_kernels.retrieval import matching
from mbm_kernels.retrieval.embed import embed_pictures, embed_texts
from mbm_kernels.retrieval.evaluate import as_text, evaluate
from mbm_kernels.retrieval.folder import check_same_model, index_folder
from mbm_kernels.retrieval.presets import preset
from mbm_kernels.retrieval.train import train_two_tower

app = typer.Typer(
    help="Find images by text and by image.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Data = Annotated[str, typer.Option("--data", help="A built-in name or the path of captions.")]
Root = Annotated[Path | None, typer.Option("--root", help="Folder of a built-in set.")]
Images = Annotated[
    Path | None, typer.Option("--images", help="What the image names of a path are relative to.")
]
Layers = Annotated[str, typer.Option("--layers", help="mbm or stock.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the data, the weights and the order.")]
Limit = Annotated[int | None, typer.Option("--limit", help="First pictures of each split only.")]
Out = Annotated[Path, typer.Option("--out", "--run", help="Folder of the checkpoints.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Optimiser steps, else the preset's.")]
Batch = Annotated[int | None, typer.Option("--batch-size", help="Pairs per step.")]
Rate = Annotated[float | None, typer.Option("--learning-rate", help="Peak learning rate.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the latest checkpoint.")]
Splits = Annotated[list[str] | None, typer.Option("--split", help="Splits; else all but train.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def root() -> None:
    """Find images by text and by image."""


@app.command()
def train(
    out: Out,
    name: Data = "scenes",
    layers: Layers = "mbm",
    steps: Steps = None,
    batch_size: Batch = None,
    learning_rate: Rate = None,
    seed: Seed = 0,
    limit: Limit = None,
    data_root: Root = None,
    images: Images = None,
    resume: Resume = False,
) -> None:
    """Train image and text encoders by the contrastive loss."""
    chosen = preset(name)
    settings = chosen.settings.changed(steps, batch_size, learning_rate)
    sets = _load(name, seed, data_root, chosen.config.image_size, limit, images)
    train_set = data.train_of(name, sets)
    _, history = train_two_tower(
        train_set,
        WordTokenizer.train(train_set.captions),
        settings,
        config=chosen.config,
        layers=layers,
        seed=seed,
        validation=sets.get("val"),
        run=out,
        resume=resume,
    )
    _report(history, out)


@app.command()
def match(
    out: Out,
    name: Data = "scenes",
    layers: Layers = "mbm",
    steps: Steps = None,
    batch_size: Batch = None,
    learning_rate: Rate = None,
    seed: Seed = 0,
    limit: Limit = None,
    data_root: Root = None,
    images: Images = None,
    resume: Resume = False,
) -> None:
    """Train the multimodal model to tell whether an image and a text belong together."""
    chosen = preset(name)
    settings = chosen.matching.changed(steps, batch_size, learning_rate)
    sets = _load(name, seed, data_root, chosen.config.image_size, limit, images)
    train_set = data.train_of(name, sets)
    _, history = matching.train_matching(
        train_set,
        WordTokenizer.train(train_set.captions),
        settings,
        layers=layers,
        seed=seed,
        validation=sets.get("val"),
        run=out,
        resume=resume,
    )
    _report(history, out)


@app.command(name="match-eval")
def match_eval(
    path: Annotated[Path, typer.Argument(help="A run or a checkpoint of `match`.")],
    name: Data = "scenes",
    split: Splits = None,
    layers: Layers = "mbm",
    seed: Seed = 0,
    limit: Limit = None,
    data_root: Root = None,
    images: Images = None,
    as_json: Json = False,
) -> None:
    """AUC of right against wrong texts, hard and easy, for every set of streams."""
    found = checkpoint.load(path, layers=layers, kind=MULTIMODAL)
    sets = _load(name, seed, data_root, found.model.image_size, limit, images)
    data.train_of(name, sets)
    swap = matching.swap_of(sets["train"], found.tokenizer)
    tables = {
        one: matching.ablations(found.model, sets[one], found.tokenizer, swap)
        for one in _splits(split, sets)
    }
    typer.echo(json.dumps(tables, indent=2) if as_json else matching.as_text(tables))


@app.command(name="eval")
def evaluate_command(
    path: Annotated[Path, typer.Argument(help="A run or a checkpoint.")],
    name: Data = "scenes",
    split: Splits = None,
    layers: Layers = "mbm",
    seed: Seed = 0,
    limit: Limit = None,
    data_root: Root = None,
    images: Images = None,
    as_json: Json = False,
) -> None:
    """R@1, R@5 and R@10 in both directions, beside colour histograms with CCA and chance."""
    found = checkpoint.load(path, layers=layers, kind=TWO_TOWER)
    sets = _load(name, seed, data_root, found.model.image_size, limit, images)
    data.train_of(name, sets)
    table = evaluate(found.model, sets, found.tokenizer, _splits(split, sets))
    typer.echo(json.dumps(table, indent=2) if as_json else as_text(table))


@app.command(name="index")
def index_command(
    folder: Annotated[Path, typer.Argument(help="Folder of images, with those below it.")],
    model: Annotated[Path, typer.Option("--model", help="A run or a checkpoint.")],
    out: Annotated[Path, typer.Option("--out", help="The index, a file.")],
    layers: Layers = "mbm",
) -> None:
    """Embed every image of a folder; those that cannot be read are counted and named."""
    found = checkpoint.load(model, layers=layers, kind=TWO_TOWER)
    made, scan = index_folder(
        folder, found, model, progress=lambda line: typer.echo(f"skipped: {line}", err=True)
    )
    made.save(out)
    typer.echo(f"{scan}; index in {out}")


@app.command()
def query(
    index: Annotated[Path, typer.Argument(help="What `retrieve index` wrote.")],
    text: Annotated[str | None, typer.Argument(help="Words to search for.")] = None,
    image: Annotated[Path | None, typer.Option("--image", help="An image to search for.")] = None,
    top: Annotated[int, typer.Option("--top", help="How many images to find.")] = 5,
    model: Annotated[
        Path | None, typer.Option("--model", help="The index's model, if it has moved.")
    ] = None,
    layers: Layers = "mbm",
    as_json: Json = False,
) -> None:
    """The images of an index nearest to a text or an image: similarity and path, one a line."""
    if (text is None) == (image is None):
        got = "neither" if text is None else "both"
        raise ValueError(f"query: got {got}, expected a text or --image; give one of the two")
    opened = indexes.load(index)
    folder = Path(opened.facts.folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"index {index}: got images of {folder}, a folder that is gone, expected one that is "
            "there; index the images where they are now"
        )
    run = model or Path(opened.facts.model)
    found = checkpoint.load(run, layers=layers, kind=TWO_TOWER)
    check_same_model(opened, found, index)
    if text is not None:
        queries = embed_texts(found.model, [text], found.tokenizer)
    else:
        assert image is not None
        picture = read_picture(image, found.model.image_size)
        queries = embed_pictures(found.model, torch.stack([picture]))
    values, rows = opened.search(queries, top)
    results = [
        {"path": str(folder / opened.names[row]), "similarity": round(value, 6)}
        for value, row in zip(values[0].tolist(), rows[0].tolist(), strict=True)
    ]
    gone = sum(not Path(str(x["path"])).is_file() for x in results)
    if gone:
        typer.echo(f"{gone} of the images found are gone; make the index again", err=True)
    if as_json:
        typer.echo(json.dumps(results, indent=2))
        return
    for x in results:
        # As bytes: a path need not be text.
        typer.echo(os.fsencode(f"{x['similarity']:.4f}\t{x['path']}"))


def _load(
    name: str, seed: int, root: Path | None, side: int, limit: int | None, images: Path | None
) -> dict[str, CaptionSet]:
    return data.load(
        name,
        seed=seed,
        root=root,
        image_size=side,
        limit=limit,
        images=images,
        progress=lambda line: typer.echo(line, err=True),
    )


def _splits(asked: list[str] | None, sets: dict[str, CaptionSet]) -> list[str]:
    """Those asked for, else all but train.

    Raises:
        ValueError: for one that the data does not have.
    """
    for one in asked or ():
        if one not in sets:
            raise ValueError(f"split: got {one!r}, expected one of {sorted(sets)}")
    return asked or [one for one in sets if one != "train"]


def _report(history: History, run: Path) -> None:
    last = history.train[-1]
    typer.echo(f"step {last['step']:.0f}, loss {last['loss']:.4f}, checkpoints in {run}")
