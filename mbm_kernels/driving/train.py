"""Cloning the expert: the mean square of the steering, by the loop that all trainings share."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mbm_kernels.captioning.data import CaptionSet, WordTokenizer
from mbm_kernels.captioning.execution import HERE, Execution
from mbm_kernels.captioning.fit import History, fit
from mbm_kernels.captioning.objective import WHOLE, Loss, Objective, Share
from mbm_kernels.captioning.presets import TrainSettings
from mbm_kernels.captioning.streams import fresh_model, subsets_of, text_lengths
from mbm_kernels.models import MultimodalBigModel, MultimodalConfig

# What a step trains on, with weights of the losses: every set that is driven with must be trained.
SUBSETS = {
    ("image", "words", "color", "time"): 0.5,
    ("words", "color", "time"): 0.1,
    ("image", "color", "time"): 0.1,
    ("image", "words", "time"): 0.1,
    ("image", "words", "color"): 0.1,
    ("image",): 0.1,
}
SETTINGS = TrainSettings(steps=800, batch_size=64, learning_rate=2e-3, warmup=50)
EPISODES = 40
NOISE = 0.5
CONFIG = MultimodalConfig(
    heads=("control",),
    vocab_size=1,  # the commands' in training
    image_size=48,
    channels=(16, 32, 64),
    features=96,
    embedding=16,
    hidden=32,
    color_bins=4,
    color_channels=(16, 32),
    time_hidden=16,
    joint=128,
)


class CloningObjective(Objective):
    """Mean squared error of the steering for every set of streams, weighted.

    A step computes the encodings once and the sets from them, so that all are trained in each.
    """

    separable = True

    def __init__(self, model: MultimodalBigModel, made_by: dict[str, Any] | None = None) -> None:
        """`made_by`: how the drives were recorded, which a resumed run must have in common."""
        super().__init__()
        self.model: MultimodalBigModel = model
        self.subsets = subsets_of(model, SUBSETS)
        self.made_by = made_by or {}

    def identity(self) -> dict[str, Any]:
        return dict(self.made_by)

    def forward(
        self,
        images: Tensor,
        tokens: Tensor,
        inputs: Tensor | None = None,
        *,
        color: Tensor,
        time: Tensor,
        time_lengths: Tensor,
        steering: Tensor,
        share: Share = WHOLE,
    ) -> Loss:
        """Loss of images [B, 3, S, S], tokens [B, T + 1] and the columns of `records.record`.

        In eval mode it is that of all streams alone.
        """
        if inputs is not None:
            tokens = torch.cat([inputs, tokens[:, -1:]], dim=1)
        every = tuple(self.model.parts)
        encodings = encode(self.model, images, tokens, color, time, time_lengths, every)
        subsets = self.subsets if self.training else {every: 1.0}
        total, parts = steering.new_zeros(()), dict[str, Tensor]()
        for subset, weight in subsets.items():
            error = steer(self.model, encodings, subset) - steering
            loss = error.square().mean() * share.rows
            parts.setdefault("all_streams", loss)
            total = total + weight * loss
        return Loss(total, parts)


def encode(
    model: MultimodalBigModel,
    images: Tensor,
    tokens: Tensor,
    color: Tensor,
    time: Tensor,
    time_lengths: Tensor,
    streams: Collection[str],
) -> dict[str, Tensor]:
    """Encodings of some of a model's streams, of images in [-1, 1] and columns as recorded."""
    given = {"image": images, "words": tokens, "color": color, "time": time}
    lengths = {"words": text_lengths(tokens, model.config.pad_id), "time": time_lengths}
    return model.encode(
        {stream: x for stream, x in given.items() if stream in streams},
        {stream: x for stream, x in lengths.items() if stream in streams},
    )


def steer(
    model: MultimodalBigModel, encodings: dict[str, Tensor], streams: tuple[str, ...]
) -> Tensor:
    """Steering [B] by some of the streams that are encoded."""
    joint = model.joint({stream: encodings[stream] for stream in streams})
    return model.control(joint).squeeze(-1)


def train_driver(
    train_set: CaptionSet,
    tokenizer: WordTokenizer,
    settings: TrainSettings = SETTINGS,
    *,
    config: MultimodalConfig = CONFIG,
    layers: str = "mbm",
    seed: int = 0,
    validation: CaptionSet | None = None,
    run: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    execution: Execution = HERE,
    made_by: dict[str, Any] | None = None,
) -> tuple[MultimodalBigModel, History]:
    """Clone the expert of recorded drives; see `captioning.fit.fit`.

    Args:
        train_set: of `records.record`. config: the sizes; vocabulary, padding and the frame's side
            are the data's. made_by: how the drives were recorded, kept in the checkpoint.

    Returns:
        The model after its last step, in eval mode, and its losses by step.

    Raises:
        ValueError: as `fit`, or settings would move the frames.
    """
    if settings.augment:
        raise ValueError(
            "augment: got True, expected False: a frame that is turned asks for another steering"
        )
    model = fresh_model(train_set, tokenizer, config, layers, seed)
    history = fit(
        CloningObjective(model, made_by),
        train_set,
        tokenizer,
        settings,
        seed=seed,
        validation=validation,
        run=run,
        resume=resume,
        title="driver" if progress else None,
        execution=execution,
    )
    return model.eval(), history
