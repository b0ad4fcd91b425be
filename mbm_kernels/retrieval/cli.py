"""`mbm-kernels retrieve`: train and score two towers, index a folder of images, search it.

Bad input raises; the caller turns that into one line and an exit status.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from mbm_kernels.captioning import checkpoint, data
from mbm_kernels.captioning.data import WordTokenizer
from mbm_kernels.captioning.fit import History
from mbm_kernels.captioning.kinds import MULTIMODAL, TWO_TOWER
from mbm_kernels.captioning.options import (
    Data,
    Images,
    Json,
    Layers,
    Limit,
    Root,
    Seed,
    TrainingOptions,
    check_splits,
    load,
    report,
    training,
)
from mbm_kernels.captioning.pictures import read_picture
from mbm_kernels.captioning.presets import TrainSettings
from mbm_kernels.retrieval import index as indexes
from mbm_kernels.retrieval import matching
from mbm_kernels.retrieval.embed import embed_pictures, embed_texts
from mbm_kernels.retrieval.evaluate import as_text, evaluate
from mbm_kernels.retrieval.folder import check_same_model, index_folder
from mbm_kernels.retrieval.presets import Preset, preset
from mbm_kernels.retrieval.train import train_two_tower

app = typer.Typer(
    help="Find images by text and by image.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Splits = Annotated[list[str] | None, typer.Option("--split", help="Splits; else all but train.")]


@app.callback()
def root() -> None:
    """Find images by text and by image."""


@app.command()
@training
def train(options: TrainingOptions) -> None:
    """Train image and text encoders by the contrastive loss."""
    chosen = preset(options.data)
    _train(partial(train_two_tower, config=chosen.config), options, chosen, chosen.settings)


@app.command()
@training
def match(options: TrainingOptions) -> None:
    """Train the multimodal model to tell whether an image and a text belong together."""
    chosen = preset(options.data)
    _train(matching.train_matching, options, chosen, chosen.matching)


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
    side = found.model.image_size
    sets = load(name, side, seed=seed, root=data_root, limit=limit, images=images)
    swap = matching.swap_of(data.train_of(name, sets), found.tokenizer)
    tables = {
        one: matching.ablations(found.model, sets[one], found.tokenizer, swap)
        for one in check_splits(split, sets)
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
    side = found.model.image_size
    sets = load(name, side, seed=seed, root=data_root, limit=limit, images=images)
    data.train_of(name, sets)  # which the baseline is fitted to
    table = evaluate(found.model, sets, found.tokenizer, check_splits(split, sets))
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


def _train(
    fit: Callable[..., tuple[object, History]],
    options: TrainingOptions,
    chosen: Preset,
    settings: TrainSettings,
) -> None:
    settings = options.changed(settings)
    sets = options.load(chosen.config.image_size)
    train_set = data.train_of(options.data, sets)
    words = WordTokenizer.train(train_set.captions)
    _, history = fit(train_set, words, settings, validation=sets.get("val"), **options.fitting())
    report(history, settings, options.out)
