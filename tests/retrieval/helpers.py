"""A tiny trained run, made once, and a folder of its images."""

import pytest
from PIL import Image

from mbm_kernels.captioning.data import WordTokenizer
from mbm_kernels.captioning.presets import TrainSettings
from mbm_kernels.models import TwoTowerConfig
from mbm_kernels.retrieval.train import train_two_tower
from tests.captioning.training_helpers import colours

SETTINGS = TrainSettings(
    steps=6, batch_size=4, warmup=2, learning_rate=1e-3, evaluate_every=3, word_dropout=0.2
)
SMALL = TwoTowerConfig(channels=(8, 8, 16), features=32, embedding=16, hidden=32, dimension=16)
HEART = TrainSettings(steps=120, batch_size=6, warmup=5, learning_rate=5e-3, evaluate_every=120)


def distinct():
    """Six images of six captions."""
    return colours(6)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    """A run that knows its six images by heart."""
    run, train_set = tmp_path_factory.mktemp("towers") / "run", distinct()
    words = WordTokenizer.train(train_set.captions)
    train_two_tower(train_set, words, HEART, config=SMALL, layers="stock", run=run, progress=False)
    return run


def save_images(folder, captions):
    """One PNG an image, named by its caption."""
    folder.mkdir(parents=True, exist_ok=True)
    for pixels, caption in zip(captions.images, captions.captions, strict=True):
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        picture.save(folder / f"{caption.replace(' ', '-')}.png")
    return folder
