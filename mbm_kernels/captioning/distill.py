"""What training minimises: cross-entropy, or distillation from a teacher."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbm_kernels.captioning.losses import losses_named
from mbm_kernels.captioning.presets import DistillSettings
from mbm_kernels.models import Captioner


PRIOR = None


class Loss(NamedTuple):
    """The total to minimise and its parts by name, all scalars."""

    total: Tensor
    parts: dict[str, Tensor]


class CrossEntropyObjective(nn.Module):
    """Next-word cross-entropy of a captioner; padding does not count."""

    def __init__(self, model: Captioner, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        self.prior = PRIOR
        self.losses = losses_named(model.layers)

    def forward(self, images: Tensor, inputs: Tensor, target: Tensor, words=None) -> Loss:
        """Loss of images [B, 3, Y, X], the words before [B, T] and the words to say [B, T]."""
        hidden, weight = self.model(images, inputs).hidden, self.model.head.weight
        if self.prior is not None and self.training:
            hidden, weight = self.prior.extend(hidden, weight, words, 0)
        head = self.model.head
        loss = self.losses.cross_entropy(
            hidden,
            weight,
            target,
            bias=head.bias,
            ignore_index=self.model.pad_id,
            label_smoothing=self.label_smoothing,
        )
        return Loss(loss, {"hard": loss})


class DistillationObjective(nn.Module):
    """Soft and hard targets of the words, and the cosine between the feature maps.

    The projection from the student's to the teacher's features is trained with the student and
    dropped afterwards. The teacher gets no gradient and is no submodule, so its parameters are
    neither optimised nor stored.
    """

    def __init__(self, model: Captioner, teacher: Captioner, settings: DistillSettings) -> None:
        super().__init__()
        for name in ("vocab_size", "image_size", "pad_id", "bos_id", "eos_id"):
            ours, theirs = model.settings[name], teacher.settings[name]
            if ours != theirs:
                raise ValueError(
                    f"{name}: got {ours} for the student and {theirs} for the teacher, expected "
                    "the same; train both on the same data"
                )
        self.model = model
        self.projection = nn.Linear(model.feature_size, teacher.feature_size, bias=False)
        self.settings = settings
        self.losses = losses_named(model.layers)
        self._teacher = (teacher.eval().requires_grad_(False),)

    @property
    def teacher(self) -> Captioner:
        return self._teacher[0]

    def forward(self, images: Tensor, inputs: Tensor, target: Tensor, words=None) -> Loss:
        """Loss of images [B, 3, Y, X], the words before [B, T] and the words to say [B, T]."""
        with torch.no_grad():
            taught = self.teacher(images, inputs)
        own = self.model(images, inputs)
        head, teacher_head = self.model.head, self.teacher.head
        words, hard, soft = self.losses.distillation(
            own.hidden,
            head.weight,
            target,
            student_bias=head.bias,
            teacher_hidden=taught.hidden,
            teacher_weight=teacher_head.weight,
            teacher_bias=teacher_head.bias,
            temperature=self.settings.temperature,
            hard_weight=self.settings.hard_weight,
            ignore_index=self.model.pad_id,
        )
        cosine = F.cosine_similarity(self.projection(own.features), taught.features, dim=-1)
        features = 1 - cosine.mean()
        total = words + self.settings.feature_weight * features
        return Loss(total, {"hard": hard, "soft": soft, "features": features})
