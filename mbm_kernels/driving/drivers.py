"""Who may sit at the wheel: the model with some of its streams, and what it is held against."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_kernels.captioning.data import CaptionSet, WordTokenizer, normalise, padded
from mbm_kernels.driving.records import Moments, lane_of
from mbm_kernels.driving.simulator import LANES
from mbm_kernels.driving.train import encode, steer
from mbm_kernels.models import MultimodalBigModel

Driver = Callable[[Moments], Tensor]  # steering [N], -1..1, at N moments

RIDGE = 1e-3  # added to the mean square of a pixel
COARSE = 8  # pixels of a side that the linear model sees


def model_driver(
    model: MultimodalBigModel, tokenizer: WordTokenizer, streams: tuple[str, ...]
) -> Driver:
    """The control head by some of the model's streams."""

    @torch.no_grad()
    def drive(seen: Moments) -> Tensor:
        tokens, _ = padded([tokenizer.encode(words) for words in seen.words], tokenizer.pad_id)
        images = normalise(seen.images)
        time = seen.time, seen.lengths
        encodings = encode(model, images, tokens, seen.color, *time, streams)
        return steer(model, encodings, streams)

    return drive


def constant_driver(records: CaptionSet) -> Driver:
    """The mean steering of recorded drives, whatever is seen."""
    mean = records.columns["steering"].mean()
    return lambda seen: mean.expand(len(seen.words))


def linear_driver(records: CaptionSet, *, by_command: bool = False) -> Driver:
    """Ridge regression of the steering on 8x8 pixels, or one regression for each lane."""
    pixels, steering = _coarse(records.images), records.columns["steering"].double().numpy()
    lanes = torch.tensor([lane_of(words) if by_command else 0 for words in records.captions])
    weights = torch.zeros(len(LANES), pixels.shape[1])
    for lane in lanes.unique().tolist():
        rows = (lanes == lane).numpy()
        x, y = pixels[rows].double().numpy(), steering[rows]
        square = x.T @ x / len(x) + RIDGE * np.eye(x.shape[1])
        weights[lane] = torch.from_numpy(np.linalg.solve(square, x.T @ y / len(x))).float()

    def drive(seen: Moments) -> Tensor:
        lanes = torch.tensor([lane_of(words) if by_command else 0 for words in seen.words])
        return (_coarse(seen.images) * weights[lanes]).sum(dim=1)

    return drive


def _coarse(images: Tensor) -> Tensor:
    """uint8 [N, 3, S, S] -> [N, 65]: 8x8 means in [-1, 1] and a one."""
    small = F.adaptive_avg_pool2d(normalise(images[:, :1]), COARSE).flatten(1)
    return torch.cat([small, torch.ones(len(small), 1)], dim=1)
