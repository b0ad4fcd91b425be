"""A tiny data set of plain colours, and short runs on it, for the tests of training."""

from dataclasses import replace

import pytest
import torch

from mbm_kernels.captioning import checkpoint
from mbm_kernels.captioning.data import CaptionSet, WordTokenizer
from mbm_kernels.captioning.distill import CrossEntropyObjective
from mbm_kernels.captioning.fit import fit
from mbm_kernels.captioning.presets import TrainSettings
from mbm_kernels.models import Captioner

SETTINGS = TrainSettings(
    steps=6, batch_size=4, warmup=2, learning_rate=1e-3, evaluate_every=3, word_dropout=0.2
)


def colours(count=12, side=16):
    """Flat images named by their colour and how bright they are."""
    names = ("red", "green", "blue")
    images = torch.zeros(count, 3, side, side, dtype=torch.uint8)
    captions = []
    for k in range(count):
        bright = k // 3 % 2
        images[k, k % 3] = 250 if bright else 110
        captions.append(f"a {'bright' if bright else 'dark'} {names[k % 3]} square")
    return CaptionSet(images, captions, [str(k) for k in range(count)])


@pytest.fixture
def train_set():
    return colours()


@pytest.fixture
def tokenizer(train_set):
    return WordTokenizer.train(train_set.captions)


def make(tokenizer, seed=0, size="student", layers="stock"):
    torch.manual_seed(seed)
    return Captioner(tokenizer.vocab_size, size=size, layers=layers, image_size=16)


def weights_of(run, which="latest"):
    return checkpoint.load(run, layers="stock", which=which).model.state_dict()


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


class Stop(Exception):
    """Ends a training from its callback."""


def stop_at(step, raises):
    def callback(done):
        if done == step:
            raises()

    return callback


def run_once(run, train_set, tokenizer, **changes):
    return fit(
        CrossEntropyObjective(make(tokenizer)),
        train_set,
        tokenizer,
        replace(SETTINGS, **changes),
        run=run,
    )
