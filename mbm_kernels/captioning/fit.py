"""One training loop for every objective: seeded, resumable, interruptible.

Everything random of a step comes from (seed, step), so a resumed run needs no generator state and
gives the same weights, bit for bit, as one that was never stopped.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from mbm_kernels.captioning import checkpoint
from mbm_kernels.captioning.data import CaptionSet, WordTokenizer, augment, collate
from mbm_kernels.captioning.kinds import kind_of
from mbm_kernels.captioning.lock import locked
from mbm_kernels.captioning.objective import Objective
from mbm_kernels.captioning.presets import TrainSettings
from mbm_kernels.captioning.progress import training_progress
from mbm_kernels.captioning.style import restyle
from mbm_kernels.captioning.taught import TaughtSet

LOG_EVERY = 20
VALIDATION_IMAGES = 256


@dataclass
class History:
    """Losses by step: means since the row before in ``train``, held-out ones in ``validation``."""

    train: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)


def fit(
    objective: Objective,
    train_set: CaptionSet,
    tokenizer: WordTokenizer,
    settings: TrainSettings,
    *,
    seed: int = 0,
    validation: CaptionSet | None = None,
    run: Path | None = None,
    resume: bool = False,
    title: str | None = None,
    after_step: Callable[[int], None] | None = None,
    taught: TaughtSet | None = None,
) -> History:
    """Minimise an objective over a set of captioned images.

    Args:
        objective: holds the model that is trained.
        seed: of the order of images, augmentation and dropout.
        validation: images whose loss decides the best checkpoint; None takes the latest.
        run: folder of the checkpoints; None writes none.
        resume: continue from the latest checkpoint of ``run``.
        title: of the progress bar; None shows none.
        after_step: called with the number of steps done, after each.
        taught: the teacher's outputs for ``train_set``, which a distillation then takes from there.

    Raises:
        ValueError: if the set has fewer images than a batch, if ``run`` holds another run's
            checkpoints, or on resuming with other settings.
        FileNotFoundError: on resuming where there is no checkpoint.
        KeyboardInterrupt: after Ctrl-C, once the last whole step is saved.
        RuntimeError: if another training works in ``run``.
        OSError: if ``run`` cannot be written, before the first step, or later a checkpoint.
    """
    if len(train_set) < settings.batch_size:
        raise ValueError(
            f"train_set: got {len(train_set)} pictures, expected at least batch_size = "
            f"{settings.batch_size}; take a smaller batch_size"
        )
    trainer = _Trainer(objective, train_set, tokenizer, settings, seed, validation, run, taught)
    with locked(run) if run is not None else nullcontext():
        if resume:
            trainer.restore()
        elif run is not None and checkpoint.exists(run):
            raise ValueError(
                f"run {run}: got a folder with checkpoints, expected an empty one; continue with "
                "--resume, or give another folder"
            )
        objective.train()
        progress = training_progress(title, settings.steps, trainer.step)
        with progress as report, deferred_sigint() as stop:
            while trainer.step < settings.steps:
                parts = trainer.advance()
                report(trainer.step, parts)
                if after_step is not None:
                    after_step(trainer.step)
                if stop.is_set():
                    trainer.save()
                    raise KeyboardInterrupt
                if trainer.step % settings.evaluate_every == 0 or trainer.step == settings.steps:
                    trainer.validate()
                    trainer.save()
        objective.eval()
    return trainer.history


class _Trainer:
    """State of a run between steps."""

    def __init__(
        self,
        objective: Objective,
        train_set: CaptionSet,
        tokenizer: WordTokenizer,
        settings: TrainSettings,
        seed: int,
        validation: CaptionSet | None,
        run: Path | None,
        taught: TaughtSet | None,
    ) -> None:
        self.objective, self.model = objective, objective.model
        self.train_set, self.tokenizer = train_set, tokenizer
        self.settings, self.seed, self.run = settings, seed, run
        self.validation, self.taught = validation, taught
        self.named = dict(objective.named_parameters())
        decayed = [p for p in self.named.values() if p.dim() > 1]
        plain = [p for p in self.named.values() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": settings.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=settings.learning_rate,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.history = History()
        words = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "black"]
        self.colour_ids = torch.tensor([tokenizer.encode(w)[1] for w in words])
        self.step = 0
        self.best_loss: float | None = None
        self.is_best = True
        self.order_epoch, self.order = -1, torch.empty(0, dtype=torch.int64)
        self.recent: list[dict[str, Tensor]] = []

    def advance(self) -> dict[str, float]:
        """Take one step; returns its losses by name."""
        settings = self.settings
        rate = settings.learning_rate * schedule(self.step, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rows = self._indices()
        images, tokens, _ = collate(self.train_set, rows, self.tokenizer)
        known = {} if self.taught is None else {"taught": self.taught.batch(rows)}
        with seeded(self.seed, self.step):
            if settings.augment:
                generator = torch.Generator().manual_seed(mix_seed(self.seed, self.step))
                images = restyle(augment(images, generator), generator)
            inputs = mask_words(tokens[:, :-1], settings.word_dropout, self.tokenizer)
            loss = self.objective(images, tokens, inputs, **known)
        self.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        nn.utils.clip_grad_norm_(self.named.values(), settings.clip, error_if_nonfinite=True)
        self.optimizer.step()
        self.step += 1
        self.is_best = self.validation is None  # until validate says otherwise
        self.recent.append({"loss": loss.total.detach(), **_detached(loss.parts)})
        shown = {name: float(x) for name, x in self.recent[-1].items()}
        if self.step % LOG_EVERY == 0 or self.step == settings.steps:
            mean = {
                name: float(torch.stack([row[name] for row in self.recent]).mean())
                for name in self.recent[0]
            }
            self.history.train.append({"step": self.step, **mean})
            self.recent.clear()
        return shown

    def validate(self) -> None:
        """Record the loss on the validation images and whether it is the best so far."""
        if self.validation is None:
            return
        loss = self.objective.held_out_loss(self.validation, self.tokenizer, VALIDATION_IMAGES)
        self.history.validation.append({"step": self.step, "loss": loss})
        self.is_best = self.best_loss is None or loss < self.best_loss
        if self.is_best:
            self.best_loss = loss

    def save(self) -> None:
        if self.run is None:
            return
        training = {}
        for name, parameter in self.named.items():
            for kind, value in self.optimizer.state[parameter].items():
                training[f"optimizer/{kind}/{name}"] = value
            if not name.startswith("model."):
                training[f"objective/{name}"] = parameter
        for name, rows in self._recent_tensors().items():
            training[f"recent/{name}"] = rows
        checkpoint.save(
            self.run,
            self.model,
            self.tokenizer,
            step=self.step,
            best=self.is_best,
            training=training,
            info={
                "training": self._identity(),
                "best_loss": self.best_loss,
                "data": self.train_set.source,
                "history": asdict(self.history),
            },
        )

    def restore(self) -> None:
        """Take over the latest checkpoint of the run."""
        if self.run is None or not checkpoint.exists(self.run):
            raise FileNotFoundError(
                f"run {self.run}: got no checkpoint to resume, expected one; start without --resume"
            )
        kind = kind_of(self.model)
        found = checkpoint.load(self.run, layers=self.model.layers, which="latest", kind=kind)
        got, expected = found.config.get("training"), self._identity()
        if got != expected or found.model.settings != self.model.settings:
            raise ValueError(
                f"run {self.run}: got a checkpoint of {got}, expected {expected}; resume with "
                "the settings that it began with"
            )
        training = checkpoint.load_training(found)
        self.model.load_state_dict(found.model.state_dict())
        try:
            self._take(training, found.config)
        except (KeyError, TypeError, RuntimeError) as error:  # absent, of another kind or shape
            raise ValueError(
                f"run {self.run}: got a checkpoint without all of what a training goes on from "
                f"({error!r}), expected one of `mbm-kernels {kind.command}`; start without --resume"
            ) from error

    def _take(self, training: dict[str, Tensor], config: dict[str, Any]) -> None:
        for name, parameter in self.named.items():
            if not name.startswith("model."):
                with torch.no_grad():
                    parameter.copy_(training[f"objective/{name}"])
            state = {
                kind: training[f"optimizer/{kind}/{name}"]
                for kind in ("step", "exp_avg", "exp_avg_sq")
            }
            if any(state[kind].shape != parameter.shape for kind in ("exp_avg", "exp_avg_sq")):
                raise TypeError(f"moments of another shape for {name}")
            self.optimizer.state[parameter] = state
        rows = {
            name.removeprefix("recent/"): x
            for name, x in training.items()
            if name.startswith("recent/")
        }
        count = len(next(iter(rows.values()))) if rows else 0
        self.recent = [{name: rows[name][k] for name in rows} for k in range(count)]
        self.step, self.best_loss = config["step"], config["best_loss"]
        self.history = History(**config["history"])
        lists = isinstance(self.history.train, list) and isinstance(self.history.validation, list)
        if not lists or not isinstance(self.best_loss, float | None):
            raise TypeError("history or best_loss of another type")

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a resumed run to be the same run."""
        data = self.train_set.checksum
        return {
            "settings": asdict(self.settings),
            "objective": type(self.objective).__name__,
            "seed": self.seed,
            "pictures": len(self.train_set),
            **({} if data is None else {"data": data}),
        }

    def _recent_tensors(self) -> dict[str, Tensor]:
        if not self.recent:
            return {}
        return {name: torch.stack([row[name] for row in self.recent]) for name in self.recent[0]}

    def _indices(self) -> Tensor:
        """Rows of this step: each epoch its own permutation, an incomplete last batch dropped."""
        size = self.settings.batch_size
        per_epoch = len(self.train_set) // size
        epoch, place = divmod(self.step, per_epoch)
        if epoch != self.order_epoch:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, -1 - epoch))
            self.order = torch.randperm(len(self.train_set), generator=generator)
            self.order_epoch = epoch
        return self.order[place * size : (place + 1) * size]


def schedule(step: int, settings: TrainSettings) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then a cosine to zero."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    left = max(1, settings.steps - settings.warmup)
    return 0.5 * (1 + math.cos(math.pi * (step - settings.warmup) / left))


def mask_words(inputs: Tensor, share: float, tokenizer: WordTokenizer) -> Tensor:
    """Input words [B, T] of which a share reads as unknown, so that the image must tell."""
    if share == 0:
        return inputs
    hide = (torch.rand(inputs.shape) < share) & (inputs > tokenizer.unk_id)
    return inputs.masked_fill(hide, tokenizer.unk_id)


def mix_seed(seed: int, step: int) -> int:
    """A generator seed for one step of one run; steps below 0 are for set-up and epochs."""
    return (seed * 1_000_003 + step) % 2**63


@contextmanager
def seeded(seed: int, step: int) -> Iterator[None]:
    """Torch's generator as a step of a run has it; the state before is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix_seed(seed, step))
        yield


def _detached(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach() for name, x in parts.items()}


@contextmanager
def deferred_sigint() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that a step is never cut in half; a second one interrupts at once.

    Signals reach only the main thread: elsewhere the event is never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(signum: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
