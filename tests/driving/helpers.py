"""A straight road in place of highway-env, and a tiny driver trained on it once."""

import numpy as np
import pytest

from mbm_kernels.captioning.data import WordTokenizer
from mbm_kernels.captioning.presets import TrainSettings
from mbm_kernels.driving.records import COMMANDS, record
from mbm_kernels.driving.simulator import HERTZ, State
from mbm_kernels.driving.train import train_driver
from mbm_kernels.models import MultimodalConfig

SIDE, BINS = 16, 4
METRES = 1.0  # of a pixel
TINY = MultimodalConfig(
    heads=("control",), vocab_size=1, channels=(8, 8, 16), features=32, embedding=8, hidden=16,
    joint=32, color_bins=BINS, color_channels=(8, 8), time_hidden=8,
)  # fmt: skip
SETTINGS = TrainSettings(
    steps=200, batch_size=32, warmup=10, learning_rate=5e-3, evaluate_every=200
)
SHORT = TrainSettings(steps=4, batch_size=8, warmup=2, learning_rate=1e-3, evaluate_every=2)
TOKENIZER = WordTokenizer.train(words for phrases in COMMANDS for words in phrases)


class StraightRoad:
    """Two lanes of 5 m ahead without end; a `Simulator`."""

    def reset(self, seed):
        random = np.random.default_rng(seed)
        self.across = float(random.choice([-2.5, 2.5]) + random.uniform(-1, 1))  # to the right
        self.heading = float(random.uniform(-0.1, 0.1))
        self.speed = 8.0

    def frame(self, side):
        pixels = np.full((side, side, 3), 100, dtype=np.uint8)
        ahead = np.arange(side)[::-1] * METRES
        place = side / 2 + (-self.across - ahead * np.sin(self.heading)) / METRES
        columns = np.arange(side)[None, :] + 0.5
        line = np.clip(1.5 - np.abs(columns - place[:, None]), 0, 1)
        return (pixels + line[..., None] * 155).astype(np.uint8)

    def state(self, lane):
        offset = self.across - (-2.5, 2.5)[lane]
        return State(self.speed, offset, abs(offset) <= 2.5, abs(self.across) <= 5)

    def expert(self, lane):
        wanted = np.clip(-self.state(lane).offset / 8, -0.5, 0.5)
        return float(np.clip(wanted - self.heading, -1, 1))

    def step(self, steering, speed):
        self.heading += 3 * float(steering) / HERTZ
        self.across += self.speed * np.sin(self.heading) / HERTZ
        self.speed += (speed - self.speed) / HERTZ


@pytest.fixture(scope="session")
def drives():
    return record(StraightRoad(), range(100, 140), side=SIDE, bins=BINS, seconds=6)


@pytest.fixture(scope="session")
def run(drives, tmp_path_factory):
    """A run that has learnt to drive on the straight road."""
    folder = tmp_path_factory.mktemp("driver") / "run"
    made_by = {"episodes": 40, "noise": 0.5}
    train_driver(
        drives, TOKENIZER, SETTINGS, config=TINY, run=folder, progress=False, made_by=made_by
    )
    return folder
