"""The similarity head: wrong texts, the loss, what each set of streams tells."""

import pytest
import torch

from mbm_kernels.captioning import checkpoint
from mbm_kernels.captioning.data import WordTokenizer, collate
from mbm_kernels.captioning.kinds import MULTIMODAL
from mbm_kernels.captioning.presets import TrainSettings
from mbm_kernels.captioning.prior import word_classes
from mbm_kernels.models import MultimodalConfig
from mbm_kernels.retrieval.matching import (
    STREAMS,
    ablations,
    as_text,
    auc,
    pair_logits,
    swap_of,
    train_matching,
)
from tests.captioning.training_helpers import assert_same, colours

SMALL = MultimodalConfig(
    streams=STREAMS, vocab_size=1, channels=(8, 8, 16), features=32, embedding=16, hidden=32,
    joint=32, color_bins=4, color_channels=(8, 8),
)  # fmt: skip


@pytest.fixture(scope="module")
def train_set():
    return colours(12)


@pytest.fixture(scope="module")
def tokenizer(train_set):
    return WordTokenizer.train(train_set.captions)


def fitted(train_set, tokenizer, steps=6, **arguments):
    settings = TrainSettings(
        steps=steps, batch_size=12, warmup=2, learning_rate=3e-3, evaluate_every=3
    )
    arguments = {"config": SMALL, "layers": "stock", "progress": False, **arguments}
    return train_matching(train_set, tokenizer, settings, **arguments)


def test_words_that_can_stand_for_each_other_are_a_class(train_set, tokenizer):
    captions = [tokenizer.encode(c) for c in train_set.captions]
    classes = word_classes(captions, tokenizer.vocab_size)
    by_class = {}
    for word in ("red", "green", "blue", "bright", "dark", "square"):
        by_class.setdefault(int(classes[tokenizer.encode(word)[1]]), []).append(word)
    assert sorted(by_class.values()) == [["bright", "dark"], ["red", "green", "blue"], ["square"]]


def test_one_word_is_exchanged_for_another_of_its_class(train_set, tokenizer):
    swap = swap_of(train_set, tokenizer)
    _, tokens, _ = collate(train_set, range(12), tokenizer)
    seen = set()
    for _ in range(20):
        changed, could = swap(tokens)
        assert could.all()
        assert ((changed != tokens).sum(dim=1) == 1).all()
        for row, caption in zip(changed, train_set.captions, strict=True):
            words, before = tokenizer.decode(row[1:].tolist()).split(), caption.split()
            assert words[0] == "a"
            assert words[1] in ("bright", "dark")
            assert words[2] in ("red", "green", "blue")
            seen |= {(a, b) for a, b in zip(words, before, strict=True) if a != b}
    assert len(seen) == 2 + 6
    _, could = swap(torch.tensor([[1, *tokenizer.encode("a square")[1:]]]))
    assert not could.any()


def test_auc():
    assert auc(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 0.0])) == 1
    assert auc(torch.tensor([3.0, 0.0]), torch.tensor([1.0, 1.0])) == 0.5
    assert auc(torch.ones(3), torch.ones(2)) == 0.5
    assert auc(torch.tensor([1.0, 2.0]), torch.tensor([1.0])) == 0.75


def test_it_learns_by_heart_and_each_stream_tells_its_part(train_set, tokenizer):
    model, history = fitted(train_set, tokenizer, 240, seed=1)
    assert history.train[-1]["loss"] < history.train[0]["loss"]
    table = ablations(model, train_set, tokenizer, swap_of(train_set, tokenizer))
    assert list(table) == ["image+words+color", "image+words", "words+color", "words"]
    for streams in ("image+words+color", "image+words", "words+color"):
        assert table[streams]["hard"] > 0.9, streams
        assert table[streams]["other"] > 0.9, streams
    assert table["words"]["other"] < 0.75  # the texts alone are the same on both sides
    text = as_text({"val": table})
    assert text.count("\n") == 3
    assert "AUC hard" in text


@pytest.mark.parametrize("streams", [STREAMS, ("image", "words"), ("words", "color")])
def test_logits_are_those_of_the_model(streams, train_set, tokenizer):
    model, _ = fitted(train_set, tokenizer)
    images, tokens, _ = collate(train_set, range(4), tokenizer)
    with torch.no_grad():
        both = pair_logits(model, images, [tokens, tokens.roll(1, 0)], streams)
        assert both.shape == (2, 4)
        torch.testing.assert_close(pair_logits(model, images, [tokens], streams)[0], both[0])
        rolled = pair_logits(model, images, [tokens.roll(1, 0)], streams)
        torch.testing.assert_close(rolled[0], both[1])


def test_a_run_is_resumed_and_read_back(train_set, tokenizer, tmp_path):
    whole, _ = fitted(train_set, tokenizer, validation=train_set, run=tmp_path / "run")
    for layers in ("stock", "mbm"):
        found = checkpoint.load(
            tmp_path / "run", layers=layers, which="latest", kind=MULTIMODAL
        ).model
        assert_same(found.state_dict(), whole.state_dict())
        assert found.config.streams == STREAMS
    with pytest.raises(ValueError, match="`mbm-kernels caption train`"):
        checkpoint.load(tmp_path / "run", layers="stock")


def test_a_model_of_fewer_streams(train_set, tokenizer):
    config = MultimodalConfig.from_dict({**SMALL.as_dict(), "streams": ["image", "words"]})
    model, _ = fitted(train_set, tokenizer, config=config)
    table = ablations(model, train_set, tokenizer, swap_of(train_set, tokenizer))
    assert list(table) == ["image+words", "words"]
