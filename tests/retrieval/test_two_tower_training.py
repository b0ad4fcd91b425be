"""Training of the two towers: resumed bit for bit, checkpoints of its own kind."""

import json
import os
import signal

import pytest
import torch

from mbm_kernels.captioning import checkpoint
from mbm_kernels.captioning.data import collate
from mbm_kernels.captioning.distill import CrossEntropyObjective
from mbm_kernels.captioning.fit import fit
from mbm_kernels.captioning.kinds import TWO_TOWER
from mbm_kernels.models import TwoTower
from mbm_kernels.retrieval.objective import ContrastiveObjective, text_lengths
from mbm_kernels.retrieval.train import train_two_tower
from tests.captioning import training_helpers
from tests.captioning.training_helpers import assert_same, stop_at
from tests.captioning.training_helpers import tokenizer as tokenizer
from tests.captioning.training_helpers import train_set as train_set

from .helpers import SETTINGS, SMALL


def objective(tokenizer):
    torch.manual_seed(1)
    return ContrastiveObjective(TwoTower(tokenizer.vocab_size, config=SMALL16, layers="stock"))


SMALL16 = SMALL.from_dict({**SMALL.as_dict(), "image_size": 16})


def test_resume_gives_the_same_bits(train_set, tokenizer, tmp_path):
    def fitted(objective, **arguments):
        return fit(objective, train_set, tokenizer, SETTINGS, validation=train_set, **arguments)

    whole = objective(tokenizer)
    history = fitted(whole, run=tmp_path / "whole")

    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fitted(objective(tokenizer), run=tmp_path / "cut", after_step=stop_at(4, interrupt))
    resumed = objective(tokenizer)
    assert fitted(resumed, run=tmp_path / "cut", resume=True) == history
    assert_same(whole.state_dict(), resumed.state_dict())
    assert len(history.validation) == 2
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in history.validation)


def test_checkpoint_round_trip_in_both_layers(train_set, tokenizer, tmp_path):
    model, _ = train_two_tower(
        train_set, tokenizer, SETTINGS, config=SMALL, layers="stock", run=tmp_path, progress=False
    )
    assert model.config == SMALL16  # the side is the data's
    batch = collate(train_set, range(4), tokenizer)
    for layers in ("stock", "mbm"):
        found = checkpoint.load(tmp_path, layers=layers, which="latest", kind=TWO_TOWER)
        assert found.model.config == SMALL16
        assert found.tokenizer.encode("a dark red square") == tokenizer.encode("a dark red square")
        torch.testing.assert_close(found.model(*batch), model(*batch))


def test_a_run_of_another_kind_is_refused(train_set, tokenizer, tmp_path):
    captioner, towers = tmp_path / "captioner", tmp_path / "towers"
    training_helpers.run_once(captioner, train_set, tokenizer, steps=1, warmup=0)
    fit(objective(tokenizer), train_set, tokenizer, SETTINGS, run=towers)
    with pytest.raises(
        ValueError, match=r"got format 'mbm_kernels.captioner'.*`mbm-kernels retrieve train`"
    ):
        checkpoint.load(captioner, layers="stock", kind=TWO_TOWER)
    with pytest.raises(
        ValueError, match=r"got format 'mbm_kernels.two_tower'.*`mbm-kernels caption train`"
    ):
        checkpoint.load(towers, layers="stock")
    model = training_helpers.make(tokenizer)
    with pytest.raises(ValueError, match=r"got format 'mbm_kernels.two_tower'"):
        fit(CrossEntropyObjective(model), train_set, tokenizer, SETTINGS, run=towers, resume=True)


def edit_model(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["model"] |= changes
    config["sha256"]["config.json"] = checkpoint.config_checksum(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"vocab_size": 10**12}, r"where the model has torch.float32 \(1000000000000,"),
        ({"vocab_size": "many"}, "no two-tower model: .*'many'"),
        ({"config": {"hidden": 10**9}}, "no two-tower model: .*hidden: got 1000000000; expected"),
        ({"config": {"depth": 3}}, "no two-tower model: .*depth: got no field"),
        ({"config": {"channels": 8}}, "no two-tower model: .*channels: got int 8"),
        ({"extra": 3}, "no two-tower model"),
    ],
)
def test_a_damaged_description_is_refused(changes, text, train_set, tokenizer, tmp_path):
    fit(objective(tokenizer), train_set, tokenizer, SETTINGS, run=tmp_path)
    edit_model(tmp_path / "step-00000006", **changes)
    with pytest.raises(ValueError, match=text):
        checkpoint.load(tmp_path, layers="stock", which="latest", kind=TWO_TOWER)


def test_hidden_words_change_the_text_alone(train_set, tokenizer):
    held = objective(tokenizer)
    images, tokens, lengths = collate(train_set, range(4), tokenizer)
    assert torch.equal(text_lengths(tokens, tokenizer.pad_id), lengths)
    whole = held(images, tokens)
    assert torch.equal(held(images, tokens, tokens[:, :-1]).total, whole.total)
    hidden = tokens[:, :-1].masked_fill(tokens[:, :-1] > 3, tokenizer.unk_id)
    assert held(images, tokens, hidden).total != whole.total
