"""`mbm-kernels caption`: prepare data, train, distil, evaluate, caption images.

Bad input raises; the caller turns that into one line and an exit status.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from mbm_kernels.captioning import checkpoint, data
from mbm_kernels.captioning.data import CaptionSet, WordTokenizer
from mbm_kernels.captioning.decode import caption_pictures, read_batches, save_attention_sheet
from mbm_kernels.captioning.evaluate import evaluate
from mbm_kernels.captioning.options import (
    Data,
    Images,
    Json,
    Layers,
    Limit,
    Root,
    Seed,
    Steps,
    TrainingOptions,
    check_splits,
    load,
    report,
    training,
)
from mbm_kernels.captioning.presets import Preset, preset, preset_for
from mbm_kernels.captioning.train import train_student, train_teacher

app = typer.Typer(
    help="Train and run the captioner.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Size = Annotated[int | None, typer.Option("--image-size", help="Side in pixels, 8 n.")]
Attention = Annotated[str, typer.Option("--attention", help="additive or dot.")]
Beam = Annotated[int, typer.Option("--beam", help="Hypotheses per picture; 1 is greedy.")]


@app.callback()
def root() -> None:
    """Train and run the captioner."""


@app.command()
def prepare(
    name: Annotated[str, typer.Argument(help="A built-in name or the path of captions.")],
    cache_dir: Annotated[Path | None, typer.Option(help="Where to keep what is fetched.")] = None,
    from_dir: Annotated[Path | None, typer.Option(help="Local copy of the packages.")] = None,
    images: Images = None,
    out: Annotated[Path | None, typer.Option(help="Prepared folder; default in the cache.")] = None,
    image_size: Size = None,
    seed: Annotated[int | None, typer.Option(help="Of the splits that are drawn.")] = None,
    workers: Annotated[int | None, typer.Option(help="Threads that decode images.")] = None,
) -> None:
    """Fetch a data set, or scan, split and decode captioned images of your own."""
    chosen = preset_for(name)
    if name not in data.NAMES:
        data.own.prepare(
            name,
            images,
            folder=out,
            image_size=image_size or chosen.image_size,
            seed=seed,
            workers=workers,
            progress=typer.echo,
        )
        return
    fetched = data.fetch(name, cache_dir, from_dir, progress=typer.echo)
    typer.echo(str(fetched or "scenes are drawn when they are loaded: nothing to prepare"))


@app.command()
@training
def train(
    options: TrainingOptions,
    size: Annotated[str, typer.Option(help="teacher or student.")] = "teacher",
    attention: Attention = "additive",
    image_size: Size = None,
    pieces: Annotated[
        int | None, typer.Option(help="BPE pieces instead of words, so many.")
    ] = None,
) -> None:
    """Train a captioner by cross-entropy."""
    chosen = preset_for(options.data)
    settings = options.changed(chosen.teacher if size == "teacher" else chosen.student)
    side = chosen.image_size if image_size is None else image_size
    sets = options.load(side, to_stderr=False)
    train_set = data.train_of(options.data, sets)
    done = train_teacher(
        train_set,
        WordTokenizer.train(train_set.captions, pieces=pieces),
        settings,
        size=size,
        attention=attention,
        validation=_validation(chosen, sets),
        **options.fitting(),
    )
    report(done.history, settings, options.out)


@app.command()
@training
def distill(
    options: TrainingOptions,
    teacher: Annotated[Path, typer.Option(help="The teacher's run or checkpoint.")],
    attention: Attention = "additive",
    temperature: Annotated[
        float | None, typer.Option(help="Of both distributions of words.")
    ] = None,
    hard_weight: Annotated[
        float | None, typer.Option(help="Share of the cross-entropy, 0 to 1.")
    ] = None,
    feature_weight: Annotated[
        float | None, typer.Option(help="Of the cosine between feature maps; 0 leaves it out.")
    ] = None,
    divergence: Annotated[str | None, typer.Option(help="forward_kl, reverse_kl or jsd.")] = None,
    beta: Annotated[
        float | None, typer.Option(help="Of jsd: 0 is forward_kl, 1 reverse_kl.")
    ] = None,
    teacher_cache: Annotated[
        Path | None, typer.Option(help="Folder of the teacher's top-k words; made if absent.")
    ] = None,
    topk: Annotated[
        int | None, typer.Option(help="Words of each place in the cache; 32 if not said.")
    ] = None,
) -> None:
    """Train a student from a teacher."""
    chosen = preset_for(options.data)
    settings = options.changed(chosen.student)
    distillation = chosen.distill.changed(
        temperature=temperature,
        hard_weight=hard_weight,
        feature_weight=feature_weight,
        divergence=divergence,
        beta=beta,
    )
    taught_by = checkpoint.load(teacher, layers=options.layers)
    sets = options.load(taught_by.model.image_size, to_stderr=False)
    done = train_student(
        data.train_of(options.data, sets),
        taught_by.tokenizer,
        settings,
        teacher=taught_by.model,
        distill=distillation,
        teacher_cache=teacher_cache,
        topk=topk,
        attention=attention,
        validation=_validation(chosen, sets),
        **options.fitting(),
    )
    report(done.history, settings, options.out)


@app.command(name="eval")
def evaluate_command(
    path: Annotated[Path, typer.Argument(help="A run or a checkpoint.")],
    name: Data = "scenes",
    split: Annotated[list[str] | None, typer.Option(help="Splits; all but train if none.")] = None,
    layers: Layers = "mbm",
    beam: Beam = 1,
    seed: Seed = 0,
    limit: Limit = None,
    data_root: Root = None,
    images: Images = None,
    as_json: Json = False,
) -> None:
    """Score a checkpoint: exact match 0..1, BLEU-4 0..100, CIDEr-D 0..10."""
    chosen = preset_for(name)
    found = checkpoint.load(path, layers=layers)
    sets = load(
        name,
        found.model.image_size,
        seed=seed,
        root=data_root,
        limit=limit,
        images=images,
    )
    scores = {}
    wanted = check_splits(split, sets)
    if not wanted:
        raise ValueError(
            f"split: got {name} with train alone, expected another; give --split train"
        )
    for each in wanted:
        _, scores[each], _ = evaluate(
            found.model, sets[each], found.tokenizer, max_length=chosen.max_length, beam=beam
        )
    if as_json:
        typer.echo(json.dumps(scores, indent=2))
        return
    for each, values in scores.items():
        shown = "  ".join(f"{metric} {value:.4g}" for metric, value in values.items())
        typer.echo(f"{each:14} {shown}")


@app.command()
def demo(
    name: Data = "scenes",
    out: Annotated[Path | None, typer.Option(help="Folder; default out/demo/<data>.")] = None,
    attention: Attention = "additive",
    steps: Steps = None,
    seed: Seed = 0,
    limit: Limit = None,
    data_root: Root = None,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Also time torch.compile of stock.")
    ] = True,
) -> None:
    """Train a teacher and two students, caption, time against stock layers, write a report."""
    from mbm_kernels.captioning import demo as whole

    preset(name)
    if data_root is None:
        data.fetch(name, progress=typer.echo)
    whole.run(
        name,
        out=out,
        root=data_root,
        attention=attention,
        seed=seed,
        limit=limit,
        steps=steps,
        compiled=compiled,
    )


@app.command()
def generate(
    path: Annotated[Path, typer.Argument(help="A run or a checkpoint.")],
    pictures: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    layers: Layers = "mbm",
    beam: Beam = 1,
    max_length: Annotated[int, typer.Option(help="The most words of a caption.")] = 24,
    attention_maps: Annotated[
        Path | None, typer.Option(help="Folder for one PNG per picture: where each word looked.")
    ] = None,
) -> None:
    """Caption image files, one line each; what does not decode in a folder is named and left."""
    found = checkpoint.load(path, layers=layers)
    alone = len(pictures) == 1 and not pictures[0].is_dir()
    done = 0
    left = partial(typer.echo, err=True)
    for batch in read_batches(pictures, found.model.image_size, left):
        loaded = torch.stack([pixels for _, pixels in batch])
        texts, words, weights = caption_pictures(
            found.model, loaded, found.tokenizer, max_length=max_length, beam=beam
        )
        for place, ((picture, pixels), text) in enumerate(zip(batch, texts, strict=True)):
            typer.echo(text if alone else f"{picture}\t{text}")
            if attention_maps is not None:
                sheet = attention_maps / f"{done + place:03d}-{picture.stem}.png"
                save_attention_sheet(sheet, pixels, words[place], weights[place])
        done += len(batch)


def _validation(chosen: Preset, sets: dict[str, CaptionSet]) -> CaptionSet | None:
    return None if chosen.validation is None else sets.get(chosen.validation)
