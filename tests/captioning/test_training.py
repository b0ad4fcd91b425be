"""Training: the loop, its checkpoints, and what happens when something goes wrong."""

import os
import signal
from dataclasses import replace

import pytest
import torch

from mbm_kernels.captioning import checkpoint
from mbm_kernels.captioning.batches import mask_words
from mbm_kernels.captioning.data import WordTokenizer, collate
from mbm_kernels.captioning.distill import (
    CrossEntropyObjective,
    DistillationObjective,
    hard_loss,
)
from mbm_kernels.captioning.evaluate import evaluate
from mbm_kernels.captioning.fit import fit
from mbm_kernels.captioning.losses import losses_named
from mbm_kernels.captioning.presets import PRESETS, DistillSettings, TrainSettings, preset
from mbm_kernels.captioning.prior import NeighbourPrior
from mbm_kernels.captioning.style import restyle
from mbm_kernels.captioning.taught import TaughtSet
from mbm_kernels.captioning.train import train_student, train_teacher
from mbm_kernels.captioning.trainer import schedule
from mbm_kernels.models import Captioner

from .training_helpers import (  # noqa: F401  the fixtures are used by name
    SETTINGS,
    Stop,
    assert_same,
    colours,
    make,
    run_once,
    stop_at,
    tokenizer,
    train_set,
    weights_of,
)


def test_learns_by_heart(train_set, tokenizer):
    settings = replace(SETTINGS, steps=80, batch_size=12, learning_rate=3e-3, warmup=5)
    done = train_teacher(
        train_set, tokenizer, settings, size="student", layers="stock", progress=False
    )
    assert done.history.train[-1]["loss"] < done.history.train[0]["loss"] / 3
    texts, scores, weights = evaluate(done.model, train_set, tokenizer)
    assert texts == train_set.captions
    assert scores["exact_match"] == 1
    assert weights[0].shape == (4, 4)  # 4 words, 2 x 2 places


def test_same_seed_same_weights(train_set, tokenizer):
    def trained(seed):
        done = train_teacher(
            train_set,
            tokenizer,
            SETTINGS,
            size="student",
            layers="stock",
            seed=seed,
            progress=False,
        )
        return done.model.state_dict()

    runs = [trained(seed) for seed in (3, 3, 4)]
    assert_same(runs[0], runs[1])
    assert not torch.equal(runs[0]["head.weight"], runs[2]["head.weight"])


def test_training_leaves_the_global_generator_alone(train_set, tokenizer):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    fit(CrossEntropyObjective(make(tokenizer, 5)), train_set, tokenizer, SETTINGS)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("kind", ["cross-entropy", "distillation", "kept teacher outputs"])
def test_resume_gives_the_same_bits(kind, train_set, tokenizer, tmp_path):
    kept = kind == "kept teacher outputs"
    settings = replace(SETTINGS, augment=not kept, neighbour_prior=True)
    teacher = make(tokenizer, 2, "teacher").eval()
    prior = NeighbourPrior([tokenizer.encode(c) for c in train_set.captions], tokenizer.vocab_size)

    def objective():
        model = make(tokenizer, 1)
        if kind == "cross-entropy":
            return CrossEntropyObjective(model, prior)
        return DistillationObjective(model, teacher, DistillSettings(), prior)

    def fitted(objective, **arguments):
        taught = TaughtSet(teacher, train_set, tokenizer) if kept else None
        return fit(
            objective,
            train_set,
            tokenizer,
            settings,
            validation=train_set,
            taught=taught,
            **arguments,
        )

    whole = objective()
    history = fitted(whole, run=tmp_path / "whole")

    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fitted(objective(), run=tmp_path / "cut", after_step=stop_at(4, interrupt))
    steps = {
        which: checkpoint.load(tmp_path / "cut", layers="stock", which=which).config["step"]
        for which in ("latest", "best")
    }
    assert steps == {"latest": 4, "best": 3}  # step 4 was never validated
    resumed = objective()
    again = fitted(resumed, run=tmp_path / "cut", resume=True)
    assert_same(whole.state_dict(), resumed.state_dict())
    assert_same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut"))
    assert history == again


def test_ctrl_c_puts_the_handler_back(train_set, tokenizer):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(
            CrossEntropyObjective(make(tokenizer)),
            train_set,
            tokenizer,
            SETTINGS,
            after_step=stop_at(1, lambda: os.kill(os.getpid(), signal.SIGINT)),
        )
    assert signal.getsignal(signal.SIGINT) is before


def test_best_checkpoint_is_of_the_lowest_validation_loss(train_set, tokenizer, tmp_path):
    # A rate this high makes the loss worse than it was after the gentle beginning.
    settings = replace(SETTINGS, steps=6, evaluate_every=1, learning_rate=3.0, warmup=5, clip=1e9)
    model = make(tokenizer)
    history = fit(
        CrossEntropyObjective(model),
        train_set,
        tokenizer,
        settings,
        validation=train_set,
        run=tmp_path,
    )
    losses = {row["step"]: row["loss"] for row in history.validation}
    best = checkpoint.load(tmp_path, layers="stock", which="best")
    assert losses[best.config["step"]] == min(losses.values()) < losses[6]
    assert hard_loss(best.model, train_set, tokenizer, 12) == pytest.approx(min(losses.values()))
    assert checkpoint.load(tmp_path, layers="stock", which="latest").config["step"] == 6
    # Only what the index names is kept.
    kept = {folder.name for folder in tmp_path.iterdir()}
    assert kept - {"README.md"} == {
        "checkpoints.json",
        f"step-{best.config['step']:08d}",
        "step-00000006",
    }


def test_refusals_of_fit(train_set, tokenizer, tmp_path):
    with pytest.raises(
        ValueError, match="train_set: got 12 pictures, expected at least batch_size"
    ):
        run_once(None, train_set, tokenizer, batch_size=13)
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume"):
        fit(
            CrossEntropyObjective(make(tokenizer)),
            train_set,
            tokenizer,
            SETTINGS,
            run=tmp_path,
            resume=True,
        )
    run_once(tmp_path, train_set, tokenizer)
    with pytest.raises(ValueError, match="got a folder with checkpoints, expected an empty one"):
        run_once(tmp_path, train_set, tokenizer)
    with pytest.raises(ValueError, match="resume with the settings that it began with"):
        fit(
            CrossEntropyObjective(make(tokenizer)),
            train_set,
            tokenizer,
            replace(SETTINGS, steps=9),
            run=tmp_path,
            resume=True,
        )


def test_schedule_warms_up_and_reaches_zero():
    settings = TrainSettings(steps=100, warmup=10)
    rates = [schedule(step, settings) for step in range(101)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == 1
    assert rates[100] == pytest.approx(0)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_restyle_keeps_white_and_changes_the_drawing():
    images = torch.ones(4, 3, 32, 32)
    generator = torch.Generator().manual_seed(0)
    white = restyle(images, generator)
    torch.testing.assert_close(white, images, atol=1e-4, rtol=0)  # a byte is 8e-3
    images[:, 0, 10:20, 8:24] = -0.5
    images[:, 1, 12:18, 8:24] = 0.2
    before = images.clone()
    first, second = (restyle(images, torch.Generator().manual_seed(k)) for k in (1, 1))
    assert torch.equal(first, second)
    assert torch.equal(images, before)
    assert first.shape == images.shape
    assert first.abs().max() <= 1
    pairs = [(first[a] - first[b]).abs().mean() for a in range(4) for b in range(a)]
    assert min(pairs) > 0.005
    assert (first[:, 0] < 0).float().mean() > 0.05  # still drawn


def test_mask_words_spares_the_special_ones(tokenizer):
    words = torch.tensor([[1, 4, 5, 6, 2, 0]]).expand(2000, -1)
    masked = mask_words(words, 0.25, tokenizer)
    assert torch.equal(masked[:, [0, 4, 5]], words[:, [0, 4, 5]])
    changed = masked != words
    assert (masked[changed] == tokenizer.unk_id).all()
    assert changed[:, 1:4].float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_prior_names_unseen_pairs_of_exchangeable_words_only():
    captions = ["a red cross", "a red star", "a green star", "a red dot", "a green dot"]
    tokenizer = WordTokenizer.train(captions)
    prior = NeighbourPrior([tokenizer.encode(c) for c in captions], tokenizer.vocab_size)
    index = {word: tokenizer.encode(word)[1] for word in ("red", "green", "cross", "star")}
    after = {tuple(pair) for pair in prior.after.nonzero().tolist()}
    before = {tuple(pair) for pair in prior.before.nonzero().tolist()}
    assert after == {(index["green"], index["cross"])}
    assert before == {(index["cross"], index["green"])}

    tokens = torch.tensor([tokenizer.encode("a green star")])  # bos a green star eos
    hidden, weight = torch.randn(1, 4, 5), torch.randn(tokenizer.vocab_size, 5)
    longer, wider = prior.extend(hidden, weight, tokens, tokenizer.pad_id)
    added = longer @ wider.T - hidden @ weight.T
    assert added[0, 2, index["cross"]].item() == pytest.approx(prior.after.min().item(), abs=1e-4)
    added[0, 2, index["cross"]] = 0
    torch.testing.assert_close(added, torch.zeros_like(added), atol=1e-4, rtol=0)


@pytest.mark.parametrize("hard_weight", [0.0, 0.3, 1.0])
def test_distillation_loss_is_what_its_parts_say(hard_weight, train_set, tokenizer):
    settings = DistillSettings(temperature=2.0, hard_weight=hard_weight, feature_weight=0.5)
    student, teacher = make(tokenizer, 1), make(tokenizer, 2, "teacher")
    objective = DistillationObjective(student, teacher, settings)
    images, tokens, _ = collate(train_set, range(6), tokenizer)
    total, parts = objective(images, tokens)
    expected = hard_weight * parts["hard"] + (1 - hard_weight) * parts["soft"]
    torch.testing.assert_close(total, expected + 0.5 * parts["features"])
    torch.testing.assert_close(
        parts["hard"], CrossEntropyObjective(student)(images, tokens).parts["hard"]
    )
    total.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert objective.projection.weight.grad is not None
    assert not any("teacher" in name for name in objective.state_dict())


def test_a_student_like_its_teacher_has_no_soft_loss(train_set, tokenizer):
    student, teacher = make(tokenizer, 1), make(tokenizer, 1)
    objective = DistillationObjective(student, teacher, DistillSettings())
    images, tokens, _ = collate(train_set, range(6), tokenizer)
    assert objective(images, tokens).parts["soft"].item() == pytest.approx(0, abs=1e-5)


def test_kept_outputs_of_a_teacher_are_its_own(train_set, tokenizer):
    teacher = make(tokenizer, 2, "teacher").eval()
    objective = DistillationObjective(make(tokenizer, 1), teacher, DistillSettings())
    rows = torch.tensor([5, 0, 3, 11, 3])
    images, tokens, _ = collate(train_set, rows, tokenizer)
    taught = TaughtSet(teacher, train_set, tokenizer).batch(rows)
    for ours, theirs in zip(
        objective(images, tokens, taught=taught), objective(images, tokens), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_teacher_outputs_are_kept_only_where_images_come_again(train_set, tokenizer):
    teacher = make(tokenizer, 2, "teacher")
    often = replace(SETTINGS, steps=100)
    cases = (often, True), (replace(often, augment=True), False), (replace(often, steps=1), False)
    for settings, kept in cases:
        found = TaughtSet.if_worth(teacher, train_set, tokenizer, settings)
        assert (found is not None) is kept


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_losses_of_both_layers_agree(divergence):
    torch.manual_seed(0)
    hidden, taught = torch.randn(3, 4, 8), torch.randn(3, 4, 6)
    weight, bias, teacher_weight = torch.randn(9, 8), torch.randn(9), torch.randn(9, 6)
    target = torch.randint(1, 9, (3, 4))
    target[:, 3] = 0
    results = []
    for layers in ("stock", "mbm"):
        losses = losses_named(layers)
        leaf = hidden.clone().requires_grad_()
        hard = losses.cross_entropy(leaf, weight, target, bias=bias, ignore_index=0)
        parts = losses.distillation(
            leaf,
            weight,
            target,
            student_bias=bias,
            teacher_hidden=taught,
            teacher_weight=teacher_weight,
            teacher_bias=bias,
            temperature=2.0,
            hard_weight=0.4,
            divergence=divergence,
            beta=0.3,
            ignore_index=0,
        )
        (hard + parts[0]).backward()
        results.append((hard, *parts, leaf.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_student_follows_its_teacher(train_set, tokenizer):
    settings = replace(SETTINGS, steps=60, batch_size=12, learning_rate=3e-3, warmup=5)
    teacher = train_teacher(
        train_set, tokenizer, settings, size="student", layers="stock", progress=False
    ).model
    done = train_student(
        train_set,
        tokenizer,
        settings,
        teacher=teacher,
        distill=DistillSettings(hard_weight=0.0),
        layers="stock",
        seed=1,
        progress=False,
    )
    first, last = done.history.train[0], done.history.train[-1]
    assert last["soft"] < first["soft"] / 3
    assert last["features"] < first["features"]
    assert evaluate(done.model, train_set, tokenizer)[1]["exact_match"] >= 0.75


def test_student_refuses_a_teacher_of_other_words(train_set, tokenizer):
    teacher = Captioner(tokenizer.vocab_size + 1, size="teacher", layers="stock", image_size=16)
    with pytest.raises(ValueError, match=r"vocab_size: got \d+ for the student and \d+ for"):
        train_student(train_set, tokenizer, SETTINGS, teacher=teacher, layers="stock")


@pytest.mark.parametrize(
    "changes", [{"steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"clip": -1.0}]
)
def test_bad_settings(changes):
    (name, value), *_ = changes.items()
    with pytest.raises(ValueError, match=f"{name}: got {value}, expected"):
        replace(SETTINGS, **changes)


def test_presets():
    assert set(PRESETS) == {"scenes", "emoji", "tuxpaint", "fashion"}
    with pytest.raises(ValueError, match="data: got 'coco', expected one of"):
        preset("coco")
