"""What training minimises: cross-entropy, or distillation from a teacher.

Both take tokens int64 [B, T + 1], bos ... eos and padding; the target of place t is token t + 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbm_kernels.captioning.data import CaptionSet, WordTokenizer, collate
from mbm_kernels.captioning.losses import losses_named
from mbm_kernels.captioning.objective import BATCH, Loss, Objective
from mbm_kernels.captioning.presets import DistillSettings
from mbm_kernels.captioning.prior import NeighbourPrior
from mbm_kernels.models import Captioner


class Taught(NamedTuple):
    """What a student learns from: the teacher's hidden [B, T, H] and features [B, S, D]."""

    hidden: Tensor
    features: Tensor


class _WordObjective(Objective):
    """A model and, in training mode only, a prior that is added to its logits."""

    def __init__(self, model: Captioner, prior: NeighbourPrior | None) -> None:
        super().__init__()
        self.model = model
        self.prior = prior
        self.losses = losses_named(model.layers)

    def words(self, hidden: Tensor, model: Captioner, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states and weight of the vocabulary's logits, the prior among them."""
        weight = model.head.weight
        if self.prior is None or not self.training:
            return hidden, weight
        return self.prior.extend(hidden, weight, tokens, model.pad_id)

    def held_out_loss(self, caption_set: CaptionSet, tokenizer: WordTokenizer, limit: int) -> float:
        return hard_loss(self.model, caption_set, tokenizer, limit)


class CrossEntropyObjective(_WordObjective):
    """Next-word cross-entropy of a captioner; padding does not count."""

    def __init__(self, model: Captioner, prior: NeighbourPrior | None = None) -> None:
        super().__init__(model, prior)

    def forward(self, images: Tensor, tokens: Tensor, inputs: Tensor | None = None) -> Loss:
        """Loss of images [B, 3, Y, X]; ``inputs`` [B, T] replaces the words that are fed."""
        inputs = tokens[:, :-1] if inputs is None else inputs
        hidden, weight = self.words(self.model(images, inputs).hidden, self.model, tokens)
        loss = self.losses.cross_entropy(
            hidden,
            weight,
            tokens[:, 1:].contiguous(),
            bias=self.model.head.bias,
            ignore_index=self.model.pad_id,
        )
        return Loss(loss, {"hard": loss})


class DistillationObjective(_WordObjective):
    """Soft and hard targets of the words, and the cosine between the feature maps.

    The projection from the student's to the teacher's features is trained with the student and
    dropped afterwards. The teacher gets no gradient and is no submodule, so its parameters are
    neither optimised nor stored.

    Raises:
        ValueError: if the two models differ in vocabulary, token ids or image size.
    """

    def __init__(
        self,
        model: Captioner,
        teacher: Captioner,
        settings: DistillSettings,
        prior: NeighbourPrior | None = None,
    ) -> None:
        super().__init__(model, prior)
        for name in ("vocab_size", "image_size", "pad_id", "bos_id", "eos_id"):
            ours, theirs = getattr(model, name), getattr(teacher, name)
            if ours != theirs:
                raise ValueError(
                    f"{name}: got {ours} for the student and {theirs} for the teacher, expected "
                    "the same; train both on the same data"
                )
        self.projection = nn.Linear(model.feature_size, teacher.feature_size, bias=False)
        self.settings = settings
        self._teacher = (teacher.eval().requires_grad_(False),)  # a tuple hides it from nn.Module

    @property
    def teacher(self) -> Captioner:
        return self._teacher[0]

    def forward(
        self,
        images: Tensor,
        tokens: Tensor,
        inputs: Tensor | None = None,
        taught: Taught | None = None,
    ) -> Loss:
        """Loss of images [B, 3, Y, X].

        Args:
            inputs: [B, T], replaces the words that the student is fed.
            taught: what the teacher says of these images and tokens; None asks it.
        """
        if taught is None:
            with torch.no_grad():
                output = self.teacher(images, tokens[:, :-1])
            taught = Taught(output.hidden, output.features)
        own = self.model(images, tokens[:, :-1] if inputs is None else inputs)
        hidden, weight = self.words(own.hidden, self.model, tokens)
        taught_hidden, taught_weight = self.words(taught.hidden, self.teacher, tokens)
        words, hard, soft = self.losses.distillation(
            hidden,
            weight,
            tokens[:, 1:].contiguous(),
            student_bias=self.model.head.bias,
            teacher_hidden=taught_hidden,
            teacher_weight=taught_weight,
            teacher_bias=self.teacher.head.bias,
            temperature=self.settings.temperature,
            hard_weight=self.settings.hard_weight,
            ignore_index=self.model.pad_id,
        )
        cosine = F.cosine_similarity(self.projection(own.features), taught.features, dim=-1)
        features = 1 - cosine.mean()
        total = words + self.settings.feature_weight * features
        return Loss(total, {"hard": hard, "soft": soft, "features": features})


@torch.no_grad()
def hard_loss(
    model: Captioner, caption_set: CaptionSet, tokenizer: WordTokenizer, limit: int
) -> float:
    """Mean cross-entropy per word on the first ``limit`` images."""
    was_training = model.training
    objective = CrossEntropyObjective(model).eval()
    total = words = 0.0
    count = min(limit, len(caption_set))
    for start in range(0, count, BATCH):
        rows = range(start, min(start + BATCH, count))
        images, tokens, lengths = collate(caption_set, rows, tokenizer)
        predicted = float((lengths - 1).sum())
        loss = objective(images, tokens)
        total += float(loss.total) * predicted
        words += predicted
    model.train(was_training)
    return total / words
