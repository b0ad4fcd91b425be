"""`mbm-kernels caption`: prepare data, train, distil, evaluate, caption images.

Bad input raises; the caller turns that into one line and an exit status.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mbm_kernels.captioning import card, checkpoint, data
from mbm_kernels.captioning.data import CaptionSet, WordTokenizer
from mbm_kernels.captioning.evaluate import evaluate
from mbm_kernels.captioning.generate import generate
from mbm_kernels.captioning.kinds import CAPTIONER
from mbm_kernels.captioning.model_config import read_config
from mbm_kernels.captioning.options import (
    Beam,
    Data,
    Images,
    Json,
    Layers,
    Limit,
    Root,
    Seed,
    TrainingOptions,
    as_table,
    check_splits,
    load,
    report,
    training,
)
from mbm_kernels.captioning.presets import Preset, preset_for
from mbm_kernels.captioning.train import train_student, train_teacher

app = typer.Typer(
    help="Train and run the captioner.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Size = Annotated[int | None, typer.Option("--image-size", help="Side in pixels, 8 n.")]
Attention = Annotated[str | None, typer.Option("--attention", help="additive, or dot.")]
ModelConfig = Annotated[
    Path | None,
    typer.Option("--model-config", help="TOML or JSON of CaptionerConfig, instead of a size."),
]


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
    model_config: ModelConfig = None,
    attention: Attention = None,
    image_size: Size = None,
    pieces: Annotated[
        int | None, typer.Option(help="BPE pieces instead of words, so many.")
    ] = None,
) -> None:
    """Train a captioner by cross-entropy."""
    chosen = preset_for(options.data)
    settings = options.changed(chosen.teacher if size == "teacher" else chosen.student)
    side = chosen.image_size if image_size is None else image_size
    config = None if model_config is None else read_config(model_config, image_size, side)
    sets = options.load(side if config is None else config.image_size, to_stderr=False)
    train_set = data.train_of(options.data, sets)
    done = train_teacher(
        train_set,
        WordTokenizer.train(train_set.captions, pieces=pieces),
        settings,
        size=size,
        config=config,
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
    model_config: ModelConfig = None,
    attention: Attention = None,
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
    side = taught_by.model.image_size
    config = None if model_config is None else read_config(model_config, None, side)
    if config is not None and config.image_size != side:
        raise ValueError(
            f"model config {model_config}: got image_size {config.image_size}, expected the "
            f"teacher's {side}; leave it out"
        )
    sets = options.load(side, to_stderr=False)
    done = train_student(
        data.train_of(options.data, sets),
        taught_by.tokenizer,
        settings,
        teacher=taught_by.model,
        distill=distillation,
        config=config,
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
    save: Annotated[
        bool, typer.Option("--save", help="Keep the scores in the run, for its model card.")
    ] = False,
) -> None:
    """Score a checkpoint: exact match in %, BLEU and ROUGE-L 0..100, CIDEr-D 0..10."""
    chosen = preset_for(name)
    found = checkpoint.load(path, layers=layers)
    run = found.path.parent
    if save and not checkpoint.exists(run):
        raise ValueError(
            f"--save: got {path}, a checkpoint outside of a run, expected a run; leave it out"
        )
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
    if save:
        how = ("greedy" if beam == 1 else f"beam of {beam}") + (
            "" if limit is None else f", first {limit} images"
        )
        kept = {"splits": scores, "how": how}
        card.add_scores(run, CAPTIONER, card.weights_of(found.config), name, kept)
    if as_json:
        typer.echo(json.dumps(scores, indent=2))
        return
    typer.echo(as_table(scores))


app.command()(generate)


def _validation(chosen: Preset, sets: dict[str, CaptionSet]) -> CaptionSet | None:
    return None if chosen.validation is None else sets.get(chosen.validation)
