"""The model card of a run."""

import errno

import pytest

from mbm_kernels.captioning import card, checkpoint
from mbm_kernels.captioning.kinds import CAPTIONER

from .training_helpers import (  # noqa: F401  the fixtures are used by name
    run_once,
    tokenizer,
    train_set,
)

SCORES = {"splits": {"val": dict.fromkeys(card.SCORED, 0.5)}, "how": "greedy"}


def test_a_card_tells_of_data_sizes_settings_scores_and_machine(train_set, tokenizer, tmp_path):
    run = tmp_path / "colours"
    run_once(run, train_set, tokenizer)
    found = checkpoint.load(run, layers="stock")
    page = (run / "README.md").read_text()
    count = sum(p.numel() for p in found.model.parameters())
    assert f"A captioner of {count:,} parameters" in page
    assert 'Captioner.from_pretrained("colours")' in page
    for row in (
        ("captions trained on", 12),
        ("hidden", 192),
        ("learning_rate", 0.001),
        ("objective", "CrossEntropyObjective"),
        ("training", "6 | {:.4f}".format(found.config["history"]["train"][-1]["loss"])),
    ):
        assert "| {} | {} |".format(*row) in page
    assert found.config["environment"]["versions"]["torch"] in page
    card.add_scores(run, CAPTIONER, card.weights_of(found.config), "colours", SCORES)
    page = (run / "README.md").read_text()
    assert "`step-00000006` on `colours` (greedy):" in page
    assert "| val | 50.00 | 0.50 | 0.50 | 0.50 | 0.50 | 0.50 | 0.50 |" in page
    # Scores belong to weights, not to the number of a step.
    checkpoint.remove(run)
    run_once(run, train_set, tokenizer, learning_rate=2e-3)
    assert "| val |" not in (run / "README.md").read_text()


def test_a_page_of_another_hand_stays(train_set, tokenizer, tmp_path):
    (tmp_path / "README.md").write_text("# mine")
    run_once(tmp_path, train_set, tokenizer, steps=1, warmup=0)
    assert (tmp_path / "README.md").read_text() == "# mine"


def test_a_card_that_cannot_be_written_leaves_the_checkpoint(
    train_set, tokenizer, tmp_path, monkeypatch
):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(card, "write_atomic", full)
    with pytest.raises(OSError, match="the checkpoint of step 1 is whole"):
        run_once(tmp_path, train_set, tokenizer, steps=1, warmup=0)
    assert checkpoint.load(tmp_path, layers="stock").config["step"] == 1
