"""A teacher's top-k outputs on disk."""

import json

import pytest
import torch
from typer.testing import CliRunner

from mbm_kernels.captioning import checkpoint
from mbm_kernels.captioning.cli import app
from mbm_kernels.captioning.data import collate
from mbm_kernels.captioning.distill import DistillationObjective
from mbm_kernels.captioning.presets import DistillSettings
from mbm_kernels.captioning.prior import NeighbourPrior
from mbm_kernels.captioning.teacher_cache import TeacherCache

from .training_helpers import (  # noqa: F401  the fixtures are used by name
    make,
    tokenizer,
    train_set,
)

ROWS = torch.tensor([5, 0, 3, 11, 3])


@pytest.fixture
def teacher(tokenizer):
    return make(tokenizer, 2, "teacher").eval()


def lengthen(train_set):
    train_set.captions[:4] = ["red", "a bright dark green square", "a blue", "bright"]


@pytest.mark.parametrize("layers", ["stock", "mbm"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_all_words_give_the_loss_of_the_teacher_itself(
    divergence, layers, teacher, train_set, tokenizer, tmp_path
):
    lengthen(train_set)
    prior = NeighbourPrior([tokenizer.encode(c) for c in train_set.captions], tokenizer.vocab_size)
    k = tokenizer.vocab_size
    cache = TeacherCache.open(tmp_path / "cache", teacher, train_set, tokenizer, k=k, prior=prior)
    settings = DistillSettings(divergence=divergence, temperature=2.0)
    student = make(tokenizer, 1, layers=layers)
    objective = DistillationObjective(student, teacher, settings, prior)
    images, tokens, _ = collate(train_set, ROWS, tokenizer)
    total, parts = objective(images, tokens, taught=cache.batch(ROWS))
    expected, expected_parts = objective(images, tokens)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(parts, expected_parts)


def test_few_words_are_the_likeliest_and_are_read_again(
    teacher, train_set, tokenizer, tmp_path, monkeypatch
):
    lengthen(train_set)
    TeacherCache.open(tmp_path, teacher, train_set, tokenizer, k=3)
    monkeypatch.setattr(teacher, "forward", None)  # it is not asked again
    taught = TeacherCache.open(tmp_path, teacher, train_set, tokenizer, k=3).batch(ROWS)
    monkeypatch.undo()
    images, tokens, lengths = collate(train_set, ROWS, tokenizer)
    with torch.no_grad():
        output = teacher(images, tokens[:, :-1])
        expected, words = teacher.logits(output.hidden).log_softmax(-1).topk(3)
    ids, log_probs = taught.topk
    for row, length in enumerate((lengths - 1).tolist()):
        assert torch.equal(ids[row, :length], words[row, :length])
        torch.testing.assert_close(log_probs[row, :length], expected[row, :length])
    torch.testing.assert_close(taught.features, output.features)


def test_another_cache_is_refused(teacher, train_set, tokenizer, tmp_path):
    def opened(teacher=teacher, k=2):
        return TeacherCache.open(tmp_path, teacher, train_set, tokenizer, k=k)

    for k in (0, tokenizer.vocab_size + 1):
        with pytest.raises(ValueError, match=f"topk: got {k}, expected 1 to"):
            opened(k=k)
    opened()
    with pytest.raises(ValueError, match="got one of another k, expected"):
        opened(k=3)
    with pytest.raises(ValueError, match="got one of another teacher, expected"):
        opened(make(tokenizer, 3, "teacher"))
    train_set.captions[0] = "blue"
    with pytest.raises(ValueError, match="got one of another data, expected"):
        opened()


def test_distill_from_a_cache(tmp_path):
    fast = ["--layers", "stock", "--batch-size", "4", "--limit", "8", "--steps", "2"]

    def call(*arguments):
        return CliRunner().invoke(app, [str(x) for x in (*arguments, *fast)])

    teacher, student, cache = (tmp_path / name for name in ("teacher", "student", "cache"))
    assert call("train", "--size", "student", "--image-size", 16, "--out", teacher).exit_code == 0
    arguments = ("distill", "--out", student, "--teacher", teacher, "--teacher-cache", cache)
    result = call(*arguments, "--augment")
    assert "teacher_cache: got" in str(result.exception)
    result = call(*arguments, "--topk", 4, "--divergence", "reverse_kl", "--feature-weight", 0)
    assert result.exit_code == 0, result.exception
    assert json.loads((cache / "cache.json").read_text())["k"] == 4
    saved = checkpoint.load(student, layers="stock").config
    assert saved["training"]["topk"] == 4
    assert saved["training"]["distill"]["divergence"] == "reverse_kl"
    assert set(saved["history"]["train"][-1]) == {"step", "loss", "hard", "soft"}
