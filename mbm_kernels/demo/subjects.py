"""What the demo times of each model: a training step and its use, of ours or of stock layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mbm_kernels.captioning.distill import CrossEntropyObjective
from mbm_kernels.captioning.kinds import CAPTIONER, MULTIMODAL, TWO_TOWER, Kind
from mbm_kernels.captioning.objective import Loss, Objective
from mbm_kernels.captioning.streams import text_lengths
from mbm_kernels.models import MultimodalBigModel
from mbm_kernels.retrieval.matching import STREAMS, pair_logits, pair_loss
from mbm_kernels.retrieval.objective import ContrastiveObjective

Call = Callable[[], Any]


@dataclass(frozen=True)
class Subject(ABC):
    """A model, and the batch of images [B, 3, Y, X] and tokens [B, T + 1] that it is timed on.

    name: in the rows. settings: as a checkpoint keeps them. weights: its state; None: random ones.
    """

    name: str
    settings: dict[str, Any]
    images: Tensor
    tokens: Tensor
    weights: dict[str, Tensor] | None = None

    def of(self, model: nn.Module) -> Subject:
        """With this model's weights."""
        return replace(self, weights=dict(model.state_dict()))

    def training_step(self, layers: str, compiled: bool) -> Call:
        """A step as `fit` takes it; the call returns the loss before the update."""
        model = self._model(layers).train()
        objective = self._objective(model).train()
        forward = torch.compile(objective) if compiled else objective
        parameters = list(model.parameters())
        # A rate of 0 leaves the weights, hence the work, the same at every repetition.
        optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)

        def step() -> float:
            loss = forward(self.images, self.tokens).total
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            return float(loss.detach())

        return step

    def _model(self, layers: str) -> Any:
        model = self.kind.build(layers=layers, **self.settings)
        if self.weights is not None:
            model.load_state_dict(self.weights)
        return model

    @property
    @abstractmethod
    def kind(self) -> Kind[Any]: ...
    @property
    @abstractmethod
    def use(self) -> str:
        """What `inference` does, for its row."""

    @abstractmethod
    def inference(self, layers: str, compiled: bool) -> Call: ...
    @abstractmethod
    def _objective(self, model: Any) -> Objective: ...


@dataclass(frozen=True)
class CaptionerSubject(Subject):
    """max_length: of a caption."""

    max_length: int = 24
    use = "captioning"
    kind = CAPTIONER

    def inference(self, layers: str, compiled: bool) -> Callable[[], list[list[int]]]:
        """Greedy captions of the images; compiled, the encoder and the step are."""
        model = self._model(layers).eval()
        if compiled:
            # Attributes of the instance hide the methods of the class.
            model.encode = torch.compile(model.encode)
            model.step = torch.compile(model.step)
        return lambda: model.generate(self.images, self.max_length)

    def _objective(self, model: Any) -> Objective:
        return CrossEntropyObjective(model)


@dataclass(frozen=True)
class TowersSubject(Subject):
    use = "embedding"
    kind = TWO_TOWER

    def inference(self, layers: str, compiled: bool) -> Callable[[], Tensor]:
        """Embeddings of the images and of the texts, [2B, D]."""
        model = self._model(layers).eval()
        lengths = text_lengths(self.tokens, model.config.pad_id)
        forward = torch.compile(model) if compiled else model

        @torch.no_grad()
        def call() -> Tensor:
            return torch.cat(forward(self.images, self.tokens, lengths))

        return call

    def _objective(self, model: Any) -> Objective:
        return ContrastiveObjective(model)


class _PairsObjective(Objective):
    """The loss of `matching.MatchingObjective`, each wrong text being that of the next image."""

    def __init__(self, model: MultimodalBigModel) -> None:
        super().__init__()
        self.model: MultimodalBigModel = model

    def forward(self, images: Tensor, tokens: Tensor, inputs: Tensor | None = None) -> Loss:
        right, wrong = pair_logits(self.model, images, [tokens, tokens.roll(1, dims=0)], STREAMS)
        return Loss(pair_loss(right, wrong), {})


@dataclass(frozen=True)
class MatchingSubject(Subject):
    use = "scoring pairs"
    kind = MULTIMODAL

    def inference(self, layers: str, compiled: bool) -> Callable[[], Tensor]:
        """Logits [2, B] of the images with their own texts and with those of the next image."""
        model = self._model(layers).eval()
        texts = [self.tokens, self.tokens.roll(1, dims=0)]
        logits = torch.compile(pair_logits) if compiled else pair_logits

        @torch.no_grad()
        def call() -> Tensor:
            return logits(model, self.images, texts, STREAMS)

        return call

    def _objective(self, model: Any) -> Objective:
        return _PairsObjective(model)
