"""A run between two steps: model, optimizer, average, losses; and its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mbm_kernels.captioning import checkpoint, processes
from mbm_kernels.captioning.average import Average
from mbm_kernels.captioning.batches import Batches, Part
from mbm_kernels.captioning.data import CaptionSet, WordTokenizer
from mbm_kernels.captioning.data.base import columns_of
from mbm_kernels.captioning.execution import Execution
from mbm_kernels.captioning.history import History
from mbm_kernels.captioning.identity import check_same_run
from mbm_kernels.captioning.kinds import kind_of
from mbm_kernels.captioning.objective import WHOLE, Objective
from mbm_kernels.captioning.parallel import Parallel, assign, like, whole
from mbm_kernels.captioning.presets import TrainSettings
from mbm_kernels.captioning.seeding import mix_seed, seeded
from mbm_kernels.captioning.taught import Teaching

LOG_EVERY = 20
VALIDATION_IMAGES = 256
MOMENTS = ("exp_avg", "exp_avg_sq")


class Trainer:
    """State of a run between steps; see `fit` for the arguments."""

    def __init__(
        self,
        objective: Objective,
        train_set: CaptionSet,
        tokenizer: WordTokenizer,
        settings: TrainSettings,
        seed: int,
        validation: CaptionSet | None,
        run: Path | None,
        taught: Teaching | None,
        execution: Execution,
    ) -> None:
        self.objective, self.model = objective, objective.model
        self.train_set, self.tokenizer = train_set, tokenizer
        self.settings, self.seed, self.run = settings, seed, run
        self.validation, self.taught = validation, taught
        self.device = processes.own_device(execution.device)
        self.own_parts = _own_parts(settings.accumulate)
        parts = settings.accumulate * processes.world()
        self.batches = Batches(train_set, tokenizer, settings, seed, parts)
        if parts > 1 and not objective.separable:
            raise ValueError(
                f"accumulate: got {settings.accumulate} parts in each of {processes.world()} "
                f"processes, expected 1 in 1: the loss of `{kind_of(self.model).command}` relates "
                "all rows of a batch to one another; leave --accumulate and torchrun out"
            )
        if settings.patience is not None and validation is None:
            raise ValueError(
                f"patience: got {settings.patience} without images to validate on, expected a "
                "split of them (val); add one, or leave --patience out"
            )
        self.identity = self._identity()
        objective.to(self.device)
        self.parallel = Parallel(objective, execution.parallel)
        self.named = dict(objective.named_parameters())
        self.optimizer = _optimizer(self.named.values(), settings)
        self.average: Average | None = None
        if settings.ema is not None:
            of_model = {n: x for n, x in self.named.items() if n.startswith("model.")}
            self.average = Average(of_model, settings.ema)
        self.history = History()
        self.step = 0
        self.best_loss: float | None = None
        self.is_best = True
        self.recent: list[dict[str, Tensor]] = []

    @property
    def done(self) -> bool:
        """Whether all steps are taken, or the last validations brought nothing."""
        patience = self.settings.patience
        early = patience is not None and self.history.stale() >= patience
        return self.step >= self.settings.steps or early

    def advance(self) -> dict[str, float]:
        """Take one step; returns its losses by name."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * schedule(self.step, settings)
        self.optimizer.zero_grad(set_to_none=True)
        losses: dict[str, Tensor] = {}
        with seeded(self.seed, self.step):
            for part in self.batches.parts(self.step, self.own_parts):
                for name, x in self._backward(part).items():
                    losses[name] = losses[name] + x if name in losses else x
        nn.utils.clip_grad_norm_(self.named.values(), settings.clip, error_if_nonfinite=True)
        self.optimizer.step()
        self.step += 1
        if self.average is not None:
            self.average.update(self.step)
        self.is_best = self.validation is None  # until validate says otherwise
        return self._record(losses)

    def _backward(self, part: Part) -> dict[str, Tensor]:
        """Gradients of some rows of the batch, added to those that there are; their losses."""
        known: dict[str, Any] = dict(columns_of(self.train_set, part.rows.tolist(), self.device))
        if part.share != WHOLE:
            known["share"] = part.share
        if self.taught is not None:
            known["taught"] = self.taught.batch(part.rows).to(self.device)
        if part.number > 0:  # what a model draws is not what the first part's rows drew
            torch.manual_seed(mix_seed(mix_seed(self.seed, self.step), part.number))
        inputs = (x.to(self.device) for x in (part.images, part.tokens, part.inputs))
        with self.parallel.part(last=part.number == self.own_parts[-1]):
            with self._autocast():
                loss = self.parallel.call(*inputs, **known)
            self.parallel.backward(loss.total)
        return {"loss": loss.total.detach(), **{n: x.detach() for n, x in loss.parts.items()}}

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.settings.amp is None:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _record(self, losses: dict[str, Tensor]) -> dict[str, float]:
        if processes.world() > 1:
            sums = processes.summed([float(x) for x in losses.values()], self.device)
            losses = dict(zip(losses, torch.tensor(sums, dtype=torch.float32), strict=True))
        self.recent.append({name: x.cpu() for name, x in losses.items()})
        if self.step % LOG_EVERY == 0 or self.step == self.settings.steps:
            self.log()
        return {name: float(x) for name, x in losses.items()}

    def log(self) -> None:
        """A row of the history from the steps since the row before."""
        if not self.recent:
            return
        means = {name: float(rows.mean()) for name, rows in self._recent_tensors().items()}
        self.history.train.append({"step": self.step, **means})
        self.recent.clear()

    def validate(self) -> None:
        """Record the loss on the validation images and whether it is the best so far."""
        if self.validation is None:
            return
        with self._averaged():
            loss = self.objective.held_out_loss(self.validation, self.tokenizer, VALIDATION_IMAGES)
            self.parallel.reshard()
        self.history.validation.append({"step": self.step, "loss": loss})
        self.is_best = self.best_loss is None or loss < self.best_loss
        if self.is_best:
            self.best_loss = loss
        if self.done:
            self.log()

    def finish(self) -> None:
        """Leaves the weights that are used in the model."""
        if self.average is not None:
            self.average.apply()
        self.parallel.finish()

    def save(self) -> None:
        """Write a checkpoint, by the first process; the others hold shards of what it writes."""
        if self.run is None:
            return
        training = {}
        for name, parameter in self.named.items():
            for kind, value in self.optimizer.state[parameter].items():
                training[f"optimizer/{kind}/{name}"] = whole(value)
            if not name.startswith("model."):
                training[f"objective/{name}"] = whole(parameter)
            elif self.average is not None:
                training[f"raw/{name}"] = whole(parameter).clone()
        for name, rows in self._recent_tensors().items():
            training[f"recent/{name}"] = rows
        with self._averaged():
            weights = {name: whole(x) for name, x in self.model.state_dict().items()}
            if processes.is_first():
                checkpoint.save(
                    self.run,
                    self.model,
                    self.tokenizer,
                    step=self.step,
                    best=self.is_best,
                    weights=weights,
                    training=training,
                    info={
                        "training": self.identity,
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
        check_same_run(self.run, found, self.identity, self.model.settings)
        training = checkpoint.load_training(found)
        try:
            self._take(training, found)
        except (KeyError, TypeError, RuntimeError) as error:  # absent, of another kind or shape
            raise ValueError(
                f"run {self.run}: got a checkpoint without all of what a training goes on from "
                f"({error!r}), expected one of `mbm-kernels {kind.command}`; start without --resume"
            ) from error

    def _take(self, training: dict[str, Tensor], found: checkpoint.Checkpoint[Any]) -> None:
        config, saved = found.config, found.model.state_dict()
        for name, parameter in self.named.items():
            own = name.removeprefix("model.")
            if own == name:
                assign(parameter, training[f"objective/{name}"])
            elif self.average is None:
                assign(parameter, saved[own])
            else:
                assign(self.average.values[name], saved[own])
                assign(parameter, training[f"raw/{name}"])
            moments = {kind: training[f"optimizer/{kind}/{name}"] for kind in MOMENTS}
            if any(x.shape != parameter.shape for x in moments.values()):
                raise TypeError(f"moments of another shape for {name}")
            step = training[f"optimizer/step/{name}"].to(self.device)
            self.optimizer.state[parameter] = {
                "step": step,
                **{kind: like(parameter, x) for kind, x in moments.items()},
            }
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
            **self.objective.identity(),
            **({} if self.taught is None else self.taught.identity()),
            "seed": self.seed,
            "pictures": len(self.train_set),
            **({} if data is None else {"data": data}),
        }

    def _averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self.average is None else self.average.applied()

    def _recent_tensors(self) -> dict[str, Tensor]:
        if not self.recent:
            return {}
        return {name: torch.stack([row[name] for row in self.recent]) for name in self.recent[0]}


def schedule(step: int, settings: TrainSettings) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then a cosine to zero."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    left = max(1, settings.steps - settings.warmup)
    return 0.5 * (1 + math.cos(math.pi * (step - settings.warmup) / left))


def _optimizer(parameters: Iterable[Tensor], settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW whose weight decay is of matrices alone."""
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for parameter in parameters:
        groups[parameter.dim() > 1].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": settings.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )


def _own_parts(accumulate: int) -> range:
    """Numbers of the parts of a step that this process computes."""
    first = processes.rank() * accumulate
    return range(first, first + accumulate)
