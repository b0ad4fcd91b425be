"""The contrastive loss of a batch of images and their captions."""

from __future__ import annotations

import torch
from torch import Tensor

from mbm_kernels.captioning.objective import Loss, Objective
from mbm_kernels.captioning.streams import text_lengths
from mbm_kernels.models import TwoTower


class ContrastiveObjective(Objective):
    """`contrastive_loss` of the towers' embeddings.

    The captions are read from bos to eos, and the words that `inputs` hides are hidden.
    """

    def __init__(self, model: TwoTower) -> None:
        super().__init__()
        self.model: TwoTower = model

    def forward(self, images: Tensor, tokens: Tensor, inputs: Tensor | None = None) -> Loss:
        """Loss of images [B, 3, Y, X] and tokens [B, T + 1]; ``inputs`` is [B, T]."""
        lengths = text_lengths(tokens, self.model.config.pad_id)
        if inputs is not None:
            tokens = torch.cat([inputs, tokens[:, -1:]], dim=1)
        loss = self.model.loss(*self.model(images, tokens, lengths))
        return Loss(loss, {})
