"""`mbm-kernels drive`: clone highway-env's lane-keeping controller, and drive in closed loop.

Bad input raises; the caller turns that into one line and an exit status.
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mbm_kernels.captioning import checkpoint, processes
from mbm_kernels.captioning.data import CaptionSet, WordTokenizer
from mbm_kernels.captioning.fit import check_empty
from mbm_kernels.captioning.kinds import DRIVER
from mbm_kernels.captioning.options import FitOptions, Json, Layers, report, training
from mbm_kernels.driving import evaluate
from mbm_kernels.driving.records import (
    COMMANDS,
    MOST_EPISODES,
    SECONDS,
    record,
    training_seeds,
    validation_seeds,
)
from mbm_kernels.driving.simulator import Racetrack
from mbm_kernels.driving.train import CONFIG, EPISODES, NOISE, SETTINGS, train_driver
from mbm_kernels.models import MultimodalConfig

app = typer.Typer(
    help="Clone a driver that keeps its lane, and drive.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def root() -> None:
    """Clone a driver that keeps its lane, and drive."""


@app.command()
@training
def train(
    options: FitOptions,
    episodes: Annotated[
        int, typer.Option("--episodes", help="Drives of the expert, of 20 s each.")
    ] = EPISODES,
    noise: Annotated[
        float,
        typer.Option("--noise", help="How far the wheel is turned aside as they are recorded."),
    ] = NOISE,
) -> None:
    """Train the four-stream model to steer as highway-env's controller does."""
    settings = options.changed(SETTINGS)
    _check_noise(noise)
    fitting = options.fitting()
    if not fitting["resume"]:
        check_empty(options.out)  # before drives are recorded
    train_set, held_out = _records(options.seed, episodes, noise, CONFIG)
    tokenizer = WordTokenizer.train(words for phrases in COMMANDS for words in phrases)
    _, history = train_driver(
        train_set,
        tokenizer,
        settings,
        validation=held_out,
        made_by={"episodes": episodes, "noise": noise},
        **fitting,
    )
    report(history, settings, options.out)


@app.command(name="eval")
def evaluate_command(
    path: Annotated[Path, typer.Argument(help="A run or a checkpoint of `train`.")],
    seeds: Annotated[int, typer.Option("--seeds", help="Episodes of each driver.")] = 20,
    seconds: Annotated[float, typer.Option("--seconds", help="Of an episode, at most.")] = SECONDS,
    layers: Layers = "mbm",
    as_json: Json = False,
) -> None:
    """Seconds in lane of the model with all streams and without each, and of its baselines."""
    if not 1 <= seeds <= MOST_EPISODES:
        raise ValueError(f"seeds: got {seeds}, expected 1 to {MOST_EPISODES}")
    if not 1 <= seconds <= 300:
        raise ValueError(f"seconds: got {seconds:g}, expected 1 to 300")
    found = checkpoint.load(path, layers=layers, kind=DRIVER)
    made = found.config.get("training") or {}
    if not {"seed", "episodes", "noise"} <= made.keys():
        raise ValueError(
            f"checkpoint {path}: got a driver without how its drives were recorded, expected "
            "one of `mbm-kernels drive train`; train it by that, or call driving.evaluate.evaluate"
        )
    _check_noise(made["noise"])
    records, held_out = _records(made["seed"], made["episodes"], made["noise"], found.model.config)
    scores = evaluate.evaluate(
        found.model,
        found.tokenizer,
        records,
        held_out,
        Racetrack,
        seeds=seeds,
        seconds=seconds,
        progress=lambda name: typer.echo(f"driving: {name}", err=True),
    )
    if as_json:
        table = {name: score.as_dict() for name, score in scores.items()}
        typer.echo(json.dumps(table, indent=2))
    else:
        typer.echo(evaluate.as_text(scores))


def _records(
    seed: int, episodes: int, noise: float, config: MultimodalConfig
) -> tuple[CaptionSet, CaptionSet]:
    """The drives of a training, and others that it does not see."""
    seeds = training_seeds(seed, episodes)
    simulator = Racetrack()
    if processes.is_first():
        typer.echo(f"recording {episodes} drives of the expert", err=True)
    made = partial(record, simulator, side=config.image_size, bins=config.color_bins, noise=noise)
    return made(seeds), made(validation_seeds())


def _check_noise(noise: float) -> None:
    if not (math.isfinite(noise) and 0 <= noise <= 1):
        raise ValueError(f"noise: got {noise:g}, expected 0 to 1")
