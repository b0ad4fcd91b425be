"""Training of the two towers by the captioner's loop: seeded, resumable, interruptible."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mbm_kernels.captioning.data import CaptionSet, WordTokenizer
from mbm_kernels.captioning.execution import HERE, Execution
from mbm_kernels.captioning.fit import History, fit
from mbm_kernels.captioning.presets import TrainSettings
from mbm_kernels.captioning.seeding import seeded
from mbm_kernels.models import TwoTower, TwoTowerConfig
from mbm_kernels.retrieval.objective import ContrastiveObjective


def train_two_tower(
    train_set: CaptionSet,
    tokenizer: WordTokenizer,
    settings: TrainSettings,
    *,
    config: TwoTowerConfig | None = None,
    layers: str = "mbm",
    seed: int = 0,
    validation: CaptionSet | None = None,
    run: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    execution: Execution = HERE,
) -> tuple[TwoTower, History]:
    """Train two towers on captioned images; see `captioning.fit.fit` for the other arguments.

    Args:
        config: the model's sizes; the image's side and the padding are the data's.

    Returns:
        The model after its last step, in eval mode, and its losses by step.
    """
    model = fresh_two_tower(train_set, tokenizer, config, layers, seed)
    history = fit(
        ContrastiveObjective(model),
        train_set,
        tokenizer,
        settings,
        seed=seed,
        validation=validation,
        run=run,
        resume=resume,
        title="two towers" if progress else None,
        execution=execution,
    )
    return model.eval(), history


def fresh_two_tower(
    train_set: CaptionSet,
    tokenizer: WordTokenizer,
    config: TwoTowerConfig | None,
    layers: str,
    seed: int,
) -> TwoTower:
    """The model before its first step; the image's side and the padding are the data's."""
    config = config or TwoTowerConfig()
    config = replace(config, image_size=train_set.images.shape[-1], pad_id=tokenizer.pad_id)
    with seeded(seed, -1):
        return TwoTower(tokenizer.vocab_size, config=config, layers=layers)
