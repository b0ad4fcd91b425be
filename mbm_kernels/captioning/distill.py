"""What training minimises: cross-entropy, or distillation from a teacher.

Both take tokens int64 [B, T + 1], bos ... eos and padding; the target of place t is token t + 1.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbm_kernels.captioning.data import CaptionSet, WordTokenizer
from mbm_kernels.captioning.losses import losses_named
from mbm_kernels.captioning.objective import WHOLE, Loss, Objective, Share
from mbm_kernels.captioning.presets import DistillSettings
from mbm_kernels.captioning.prior import NeighbourPrior
from mbm_kernels.captioning.taught import Taught, checksum
from mbm_kernels.models import Captioner


class _WordObjective(Objective):
    """A model and, in training mode only, a prior that is added to its logits."""

    separable = True

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

    def hard(self, hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        """Next-word cross-entropy, the mean over words; padding does not count."""
        return self.losses.cross_entropy(
            hidden,
            weight,
            tokens[:, 1:].contiguous(),
            bias=self.model.head.bias,
            ignore_index=self.model.pad_id,
        )

    def held_out(self, images: Tensor, tokens: Tensor, **columns: Tensor) -> tuple[Tensor, float]:
        """Cross-entropy, weighted by predicted words, whatever is trained on."""
        loss = self(images, tokens, hard_only=True, **columns).total
        return loss, float((tokens[:, 1:] != self.model.pad_id).sum())


class CrossEntropyObjective(_WordObjective):
    """Next-word cross-entropy of a captioner; padding does not count."""

    def __init__(self, model: Captioner, prior: NeighbourPrior | None = None) -> None:
        super().__init__(model, prior)

    def forward(
        self,
        images: Tensor,
        tokens: Tensor,
        inputs: Tensor | None = None,
        share: Share = WHOLE,
        hard_only: bool = True,
    ) -> Loss:
        """Loss of images [B, 3, Y, X]; ``inputs`` [B, T] replaces the words that are fed.

        It knows no other term than that of ``hard_only``.
        """
        inputs = tokens[:, :-1] if inputs is None else inputs
        hidden, weight = self.words(self.model(images, inputs).hidden, self.model, tokens)
        loss = self.hard(hidden, weight, tokens) * share.words
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
        self.projection: nn.Linear | None = None
        if settings.feature_weight > 0:
            self.projection = nn.Linear(model.feature_size, teacher.feature_size, bias=False)
        self.settings = settings
        self._teacher = (teacher.eval().requires_grad_(False),)  # a tuple hides it from nn.Module

    @property
    def teacher(self) -> Captioner:
        return self._teacher[0]

    def identity(self) -> dict[str, Any]:
        return {"distill": asdict(self.settings), "teacher": checksum(self.teacher)}

    def forward(
        self,
        images: Tensor,
        tokens: Tensor,
        inputs: Tensor | None = None,
        taught: Taught | None = None,
        share: Share = WHOLE,
        hard_only: bool = False,
    ) -> Loss:
        """Loss of images [B, 3, Y, X].

        Args:
            inputs: [B, T], replaces the words that the student is fed.
            taught: what the teacher says of these images and tokens; None asks it.
            share: of the rows and words of the batch that these are.
            hard_only: the student's cross-entropy, without the teacher.
        """
        own = self.model(images, tokens[:, :-1] if inputs is None else inputs)
        hidden, weight = self.words(own.hidden, self.model, tokens)
        if hard_only:
            loss = self.hard(hidden, weight, tokens) * share.words
            return Loss(loss, {"hard": loss})
        if taught is None:
            with torch.no_grad():
                output = self.teacher(images, tokens[:, :-1])
            taught = Taught(output.features, output.hidden)
        terms = self.losses.distillation(
            hidden,
            weight,
            tokens[:, 1:].contiguous(),
            student_bias=self.model.head.bias,
            **self._source(taught, tokens),
            temperature=self.settings.temperature,
            hard_weight=self.settings.hard_weight,
            divergence=self.settings.divergence,
            beta=self.settings.beta,
            ignore_index=self.model.pad_id,
        )
        total, hard, soft = (x * share.words for x in terms)
        parts = {"hard": hard, "soft": soft}
        if self.projection is not None:
            cosine = F.cosine_similarity(self.projection(own.features), taught.features, dim=-1)
            parts["features"] = (1 - cosine.mean()) * share.rows
            total = total + self.settings.feature_weight * parts["features"]
        return Loss(total, parts)

    def _source(self, taught: Taught, tokens: Tensor) -> dict[str, Any]:
        """The teacher as `linear_distillation_loss` takes it."""
        if taught.topk is not None:
            return {"teacher_topk": taught.topk}
        assert taught.hidden is not None
        hidden, weight = self.words(taught.hidden, self.teacher, tokens)
        bias = self.teacher.head.bias
        return {"teacher_hidden": hidden, "teacher_weight": weight, "teacher_bias": bias}


def hard_loss(
    model: Captioner, caption_set: CaptionSet, tokenizer: WordTokenizer, limit: int
) -> float:
    """Mean cross-entropy per word on the first ``limit`` captions."""
    was_training = model.training
    loss = CrossEntropyObjective(model).held_out_loss(caption_set, tokenizer, limit)
    model.train(was_training)
    return loss
