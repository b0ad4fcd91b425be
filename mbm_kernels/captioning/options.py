"""What the commands on captioned data share: options, the data they name, and the last line."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from mbm_kernels.captioning import checkpoint, data, processes, settings_file
from mbm_kernels.captioning.data import CaptionSet
from mbm_kernels.captioning.execution import Execution
from mbm_kernels.captioning.fit import History
from mbm_kernels.captioning.presets import TrainSettings

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
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the latest checkpoint.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


Batch = Annotated[
    int | None, typer.Option("--batch-size", help="Rows of a step, of all processes together.")
]
Accumulate = Annotated[
    int | None,
    typer.Option("--accumulate", help="Parts of a step, one after another."),
]
Rate = Annotated[float | None, typer.Option("--learning-rate", help="Peak learning rate.")]
Warmup = Annotated[
    int | None, typer.Option("--warmup", help="Steps up to the peak, before a cosine to zero.")
]
Decay = Annotated[
    float | None, typer.Option("--weight-decay", help="Of matrices, decoupled (AdamW).")
]
Clip = Annotated[float | None, typer.Option("--clip", help="Largest norm of the gradient.")]
WordDropout = Annotated[
    float | None, typer.Option("--word-dropout", help="Share of the input words that are hidden.")
]
Augment = Annotated[
    bool | None,
    typer.Option("--augment/--no-augment", help="Move and recolour images."),
]
Ema = Annotated[
    float | None,
    typer.Option("--ema", help="Decay of the average of the weights."),
]
Every = Annotated[
    int | None, typer.Option("--evaluate-every", help="Steps between validations and checkpoints.")
]
Patience = Annotated[
    int | None, typer.Option("--patience", help="Validations without a lower loss before it stops.")
]
Amp = Annotated[str | None, typer.Option("--amp", help="bf16: autocast to bfloat16.")]


@dataclass(frozen=True)
class FitOptions:
    """The options of every command that trains, whatever on."""

    out: Out
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="TOML file of options; flags override it.",
            is_eager=True,
            callback=settings_file.read,
        ),
    ] = None
    layers: Layers = "mbm"
    seed: Seed = 0
    steps: Steps = None
    batch_size: Batch = None
    accumulate: Accumulate = None
    learning_rate: Rate = None
    warmup: Warmup = None
    weight_decay: Decay = None
    clip: Clip = None
    word_dropout: WordDropout = None
    ema: Ema = None
    amp: Amp = None
    evaluate_every: Every = None
    patience: Patience = None
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu"
    parallel: Annotated[
        str, typer.Option("--parallel", help="ddp or fsdp2, where torchrun starts several.")
    ] = "ddp"
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write losses to tensorboard/ in --out.")
    ] = False
    resume: Resume = False

    def changed(self, settings: TrainSettings) -> TrainSettings:
        """A preset's settings, but for what the options say."""
        names = {x.name for x in fields(TrainSettings)} & {x.name for x in fields(self)}
        return settings.changed(**{name: getattr(self, name) for name in names})

    def fitting(self) -> dict[str, Any]:
        """What the functions that train take of them.

        Where torchrun restarts workers that die, ``--resume`` begins anew in an empty folder: the
        same command line must begin a run and go on with it.
        """
        begins = processes.restartable() and not checkpoint.exists(self.out)
        return {
            "layers": self.layers,
            "seed": self.seed,
            "run": self.out,
            "resume": self.resume and not begins,
            "execution": Execution(self.device, self.parallel, self.tensorboard),
        }


@dataclass(frozen=True)
class TrainingOptions(FitOptions):
    """The options of every command that trains on captioned images."""

    data: Data = "scenes"
    images: Images = None
    root: Root = None
    limit: Limit = None
    augment: Augment = None

    def load(self, image_size: int, *, to_stderr: bool = True) -> dict[str, CaptionSet]:
        """The splits, by the first process first: it prepares data of the user's own."""
        with processes.first_alone():
            return load(
                self.data,
                image_size,
                seed=self.seed,
                root=self.root,
                limit=self.limit,
                images=self.images,
                to_stderr=to_stderr,
            )


def training(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose first parameter is FitOptions or of a class of it, with these as options.

    It runs in the group of the processes that torchrun started, if it did.
    """
    first, *own = inspect.signature(command, eval_str=True).parameters.values()
    kind: type[FitOptions] = first.annotation
    shared = [
        x.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for x in inspect.signature(kind, eval_str=True).parameters.values()
    ]
    names = [x.name for x in shared]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        options = kind(**{name: given.pop(name) for name in names})
        with processes.group(processes.own_device(options.device)):
            command(options, **given)

    parameters = shared + [x.replace(kind=inspect.Parameter.KEYWORD_ONLY) for x in own]
    run.__annotations__ = {x.name: x.annotation for x in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    del run.__wrapped__  # whose signature typer would read
    return run


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


def report(history: History, settings: TrainSettings, run: Path) -> None:
    """The line that ends a training, by the first process."""
    if not processes.is_first():
        return
    last = history.train[-1]
    line = f"step {last['step']:.0f}, loss {last['loss']:.4f}, checkpoints in {run}"
    if last["step"] < settings.steps:
        line += f" (stopped: no lower loss in {settings.patience} validations)"
    typer.echo(line)
