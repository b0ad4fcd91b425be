"""Hyper-parameters of the two towers by data set."""

from __future__ import annotations

from dataclasses import dataclass

from mbm_kernels.captioning.presets import TrainSettings
from mbm_kernels.models import TwoTowerConfig


@dataclass(frozen=True)
class Preset:
    """What one data set needs.

    settings: of the towers' training. matching: of the similarity head's. config: the towers'
    sizes, of which the image's side is both models'. demo_steps: of both trainings in the demo.
    """

    settings: TrainSettings
    matching: TrainSettings
    config: TwoTowerConfig
    demo_steps: int


PRESETS = {
    "scenes": Preset(
        TrainSettings(steps=1000, batch_size=64, learning_rate=3e-3),
        TrainSettings(steps=1200, batch_size=64, learning_rate=2e-3),
        TwoTowerConfig(image_size=56),
        demo_steps=250,
    ),
    "emoji": Preset(
        TrainSettings(
            steps=2000, batch_size=64, learning_rate=3e-3, augment=True, word_dropout=0.1
        ),
        TrainSettings(steps=2000, batch_size=64, learning_rate=2e-3, augment=True),
        TwoTowerConfig(image_size=64),
        demo_steps=1000,
    ),
}


# Data of which nothing is known: words and colours may mean each other, so nothing is recoloured.
OWN = Preset(
    TrainSettings(steps=2000, batch_size=64, learning_rate=3e-3, word_dropout=0.1),
    TrainSettings(steps=2000, batch_size=64, learning_rate=2e-3),
    TwoTowerConfig(image_size=64),
    demo_steps=1000,
)


def preset(data: str) -> Preset:
    """The preset of a data set; one without its own has OWN."""
    return PRESETS.get(data, OWN)
