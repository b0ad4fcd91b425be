"""Metrics against values computed by other means, and the baselines."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable

import pytest
import torch

from mbm_kernels.captioning import metrics
from mbm_kernels.captioning.data import CaptionSet

from . import coco_scores

# CIDEr values: coco-caption's CiderScorer (pycocoevalcap 1.2, n=4, sigma=6) on the same words.
SCENES = (
    [
        "a small red circle",
        "a large blue star above a small green square",
        "a small red circle left of a small red circle",
        "a large pink cross",
    ],
    [
        "a small red circle",
        "a large blue star below a small green square",
        "a small red circle left of a small blue circle",
        "a small black cross",
    ],
    6.1171508460212785,
)
SEVERAL = (
    [
        "a man rides a brown horse on the beach",
        "two dogs play with a ball",
        "a plate of food on a table",
        "kiss: woman, man, dark skin tone",
        "a t-shirt",
    ],
    [
        [
            "a man riding a horse on the beach",
            "a person rides a brown horse along the shore",
        ],
        ["two dogs are playing with a red ball on grass"],
        [
            "a white plate topped with food and a fork",
            "a plate of food on a wooden table",
            "some food on a plate",
        ],
        ["kiss: man, man, dark skin tone"],
        ["t-shirt"],
    ],
    3.5898424626725016,
)
REPEATS = (
    ["red red red red red", "dog cat", "one two three four"],
    [
        "red dog",
        "dog cat bird",
        "one two three four five six seven eight nine ten eleven twelve",
    ],
    1.9626029702094747,
)


@pytest.mark.parametrize(
    ("predictions", "references", "expected"),
    [SCENES, SEVERAL, REPEATS],
    ids=["scenes", "several_references", "repeats"],
)
def test_cider_d_equals_the_published_scorer(
    predictions: list[str], references: list, expected: float
) -> None:
    assert metrics.cider_d(predictions, references) == pytest.approx(expected, abs=1e-12)


def test_cider_d_by_hand() -> None:
    # Two images, no shared word: every n-gram has idf log 2, so the vectors are counts.
    # "a b c d" for "a b c": cosines 3/(2 sqrt 3), 2/(sqrt 3 sqrt 2), 1/sqrt 2, 0;
    # the lengths differ by one word.
    cosines = 3 / math.sqrt(12) + 2 / math.sqrt(6) + 1 / math.sqrt(2)
    first = 10 * math.exp(-1 / 72) * cosines / 4
    second = 10 * 2 / 4  # "x y" exact: orders 1 and 2 of four
    got = metrics.cider_d(["a b c d", "x y"], ["a b c", "x y"])
    assert got == pytest.approx((first + second) / 2, abs=1e-12)


def test_cider_d_clips_repeats_and_punishes_length() -> None:
    references = ["a red star", "two dogs run fast"]
    once = metrics.cider_d(["a red star", "x"], references)
    repeated = metrics.cider_d(["a red star a red star a red star", "x"], references)
    assert repeated < 0.6 * once


def test_cider_d_bounds() -> None:
    captions = SCENES[1]
    assert metrics.cider_d(captions, captions) == pytest.approx(10, abs=1e-12)
    assert metrics.cider_d(["zebra"] * 4, captions) == 0
    assert metrics.cider_d([""] * 4, captions) == 0
    assert metrics.cider_d(["a cat"], ["a cat"]) == 0  # one document: every idf is 0
    assert metrics.cider_d(["crab", "swan"], ["crab", "swan"]) == pytest.approx(2.5, abs=1e-12)


def test_punctuation_is_no_word_but_part_of_one() -> None:
    assert metrics._ngrams("Kiss: woman, t-shirt o\u2019clock.") == metrics._ngrams(
        "kiss woman t-shirt o\u2019clock"
    )
    assert ("t-shirt",) in metrics._ngrams("a t-shirt")
    assert ("#",) in metrics._ngrams("keycap: #")


def test_all_scores_are_those_of_pycocoevalcap() -> None:
    """On 1,000 drawn cases; coco_scores.py writes its scores, which here are computed anew
    where it is installed."""
    stored = json.loads(coco_scores.PATH.read_text())
    assert stored["columns"] == list(coco_scores.COLUMNS)
    installed = importlib.util.find_spec("pycocoevalcap") is not None
    for case, row in zip(coco_scores.drawn(), stored["scores"], strict=True):
        expected = dict(zip(coco_scores.COLUMNS, row, strict=True))
        scores = metrics.score(*case)
        got = {name: scores[name] for name in expected}
        assert got == pytest.approx(expected, abs=1e-6, rel=0), case
        if installed:
            assert row == pytest.approx(coco_scores.published(*case), abs=1e-8, rel=0), case


def test_bleu_by_hand() -> None:
    # 9 of 10 unigrams, 7 of 9 bigrams, 5 of 8 trigrams, 4 of 7 4-grams; equal lengths.
    prediction = ["a b c d e f g X i j"]
    reference = ["a b c d e f g h i j"]
    shares = (9 / 10, 7 / 9, 5 / 8, 4 / 7)
    expected = [100 * math.prod(shares[:n]) ** (1 / n) for n in (1, 2, 3, 4)]
    assert metrics.bleu(prediction, reference) == pytest.approx(expected, rel=1e-8)


def test_bleu_brevity_and_several_references() -> None:
    prediction = ["a b c d e"]
    # Precision 1, 5 words for 10: the brevity penalty alone.
    got = metrics.bleu(prediction, ["a b c d e f g h i j"])
    assert got == pytest.approx([100 * math.exp(1 - 10 / 5)] * 4)
    uneven = [["a b c d e", "z"], ["p q r s t"]]
    assert metrics.bleu(["a b c d e", "P, Q R S T."], uneven) == pytest.approx([100] * 4)


def test_rouge_l_by_hand() -> None:
    # Common: a c e; precision 3/4, recall 3/5; 2.44 p r / (r + 1.44 p).
    expected = 100 * 2.44 * 0.75 * 0.6 / (0.6 + 1.44 * 0.75)
    assert metrics.rouge_l(["a c x e"], ["a b c d e"]) == pytest.approx(expected)
    assert metrics.rouge_l(["x", "a b"], ["y", "a b"]) == 50


def test_exact_match_counts_whole_captions() -> None:
    assert metrics.exact_match(["a b", "A  B ", "a", "b a"], ["a b"] * 4) == 0.5
    assert metrics.exact_match(["b"], [["a", "b"]]) == 1
    assert metrics.exact_match(["kiss woman"], ["kiss: woman"]) == 0


def test_score_holds_them_all() -> None:
    predictions, references, cider = SCENES
    got = metrics.score(predictions, references)
    by_order = ["bleu1", "bleu2", "bleu3", "bleu4"]
    assert list(got) == ["exact_match", *by_order, "rouge_l", "cider_d"]
    assert got["exact_match"] == 0.25
    assert got["cider_d"] == pytest.approx(cider)
    assert tuple(got[name] for name in by_order) == metrics.bleu(predictions, references)
    assert metrics.score(references, references) == pytest.approx(
        {"exact_match": 1, **dict.fromkeys(by_order, 100), "rouge_l": 100, "cider_d": 10}
    )


@pytest.mark.parametrize(
    "metric",
    [metrics.score, metrics.exact_match, metrics.bleu, metrics.rouge_l, metrics.cider_d],
)
def test_nonsense_is_refused(metric: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="got 0 predictions and 0 references"):
        metric([], [])
    with pytest.raises(ValueError, match="got 1 predictions and 2 references"):
        metric(["a"], ["a", "b"])
    with pytest.raises(ValueError, match=r"references\[1\]: got an empty list"):
        metric(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="got a single string"):
        metric("a", "a")


def _set(images: torch.Tensor) -> CaptionSet:
    names = [str(i) for i in range(len(images))]
    return CaptionSet(images=images, captions=names, ids=names)


def test_most_frequent_caption() -> None:
    images = torch.zeros(5, 3, 4, 4, dtype=torch.uint8)
    train = CaptionSet(images=images, captions=["b", "c", "a", "b", "c"], ids=list("12345"))
    assert metrics.most_frequent_caption(train) == "b"
    assert metrics.most_frequent_caption(["z", "z", "a"]) == "z"
    with pytest.raises(ValueError, match="got no caption"):
        metrics.most_frequent_caption([])


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_nearest_image_is_the_exact_nearest(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60, 3, 9, 7), generator=generator, dtype=torch.uint8)
    queries = torch.randint(0, 256, (40, 3, 9, 7), generator=generator, dtype=torch.uint8)
    gap = queries[:, None].double() - images[None].double()
    expected = gap.square().sum((2, 3, 4)).argmin(1).tolist()
    assert metrics._nearest(images, queries, chunk) == expected
    assert metrics.nearest_image_captions(_set(images), queries) == [str(i) for i in expected]


def test_nearest_image_tells_one_grey_level_and_takes_the_first_of_equals() -> None:
    # 64 x 64 squared distances near 1e9: float32 alone cannot tell a difference of 1.
    images = torch.zeros(6, 3, 64, 64, dtype=torch.uint8)
    images[1::2, 0, 0, 0] = 1
    query = torch.full((2, 3, 64, 64), 255, dtype=torch.uint8)
    query[1, 0, 0, 0] = 0
    assert metrics.nearest_image_captions(_set(images), query) == ["1", "0"]


def test_nearest_image_refuses_other_pictures() -> None:
    train = _set(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"got query torch.uint8 \[1, 3, 4, 4\]"):
        metrics.nearest_image_captions(train, torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"got query torch.float32"):
        metrics.nearest_image_captions(train, torch.zeros(1, 3, 8, 8))
    empty = _set(torch.zeros(0, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="empty training set"):
        metrics.nearest_image_captions(empty, train.images)
    assert metrics.nearest_image_captions(train, train.images[:0]) == []


def test_chinese_is_scored_by_character():
    for metric in (metrics.bleu, metrics.rouge_l):
        assert metric(["一只黑狗在跑"], ["一只黑狗在叫"]) == metric(
            ["a b c d e f"], ["a b c d e g"]
        )
    spaced = metrics.cider_d(["a b c d e f", "x y"], ["a b c d e g", "x z"])
    assert metrics.cider_d(["一只黑狗在跑", "猫睡"], ["一只黑狗在叫", "猫吃"]) == pytest.approx(
        spaced
    )
