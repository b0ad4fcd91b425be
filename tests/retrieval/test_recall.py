"""R@k, its chance, and the baseline of histograms and word counts."""

from itertools import permutations

import numpy as np
import pytest
import torch

from mbm_kernels.captioning.data import CaptionSet, WordTokenizer
from mbm_kernels.models import TwoTower
from mbm_kernels.retrieval.baselines import CCA, HistogramCCA, TfIdf, color_histograms
from mbm_kernels.retrieval.embed import embed_set, embed_texts
from mbm_kernels.retrieval.evaluate import as_text, evaluate
from mbm_kernels.retrieval.recall import belonging, chance, recalls
from tests.captioning.training_helpers import colours

from .helpers import SMALL, distinct


def set_of(captions: list[str], image_of: list[int] | None = None) -> CaptionSet:
    count = len(captions) if image_of is None else max(image_of) + 1
    images = torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
    of = None if image_of is None else torch.tensor(image_of)
    return CaptionSet(images, captions, [str(k) for k in range(count)], of)


def test_captions_of_one_image_all_belong_to_it():
    several = set_of(["a", "b", "b", "c"], [0, 0, 1, 2])
    belongs = belonging(several)
    assert belongs.int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 0], [0, 0, 1]]
    image, text = torch.eye(3), torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]])
    found = recalls(image, text, belongs, ks=(1,))
    assert found["text_to_image"]["R@1"] == 3 / 4  # the third caption finds the third image
    assert found["image_to_text"]["R@1"] == pytest.approx(2 / 3)
    expected = chance(belongs, (1,))
    assert expected["text_to_image"]["R@1"] == pytest.approx((1 + 2 + 2 + 1) / 4 / 3)
    assert expected["image_to_text"]["R@1"] == pytest.approx((3 + 2 + 1) / 3 / 4)


def test_recall_counts_what_ranks_before():
    text = torch.eye(3)
    image = torch.tensor([[1.0, 0.0, 0.2], [0.0, 0.5, 0.9], [0.3, 0.6, 0.1]])
    found = recalls(image, text, torch.eye(3) > 0, ks=(1, 2, 3))
    # By text: image 0 first; image 1 after image 2; image 2 last.
    assert found["text_to_image"] == {"R@1": 1 / 3, "R@2": 2 / 3, "R@3": 1.0}
    # By image: text 0 first; text 1 after text 2; text 2 last.
    assert found["image_to_text"] == {"R@1": 1 / 3, "R@2": 2 / 3, "R@3": 1.0}


def test_any_image_of_the_same_caption_counts():
    image = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    text = torch.tensor([[1.0, 0.1], [1.0, 0.1], [0.0, 1.0]])
    found = recalls(image, text, belonging(set_of(["a", "a", "b"])), ks=(1,))
    assert found["text_to_image"]["R@1"] == 1


def test_equal_scores_find_nothing():
    flat = torch.ones(8, 4)
    found = recalls(flat, flat, torch.eye(8) > 0, ks=(1, 5))
    assert found["text_to_image"] == {"R@1": 0.0, "R@5": 0.0}


@pytest.mark.parametrize("captions", [["a", "b", "c", "d"], ["a", "a", "b", "c"], ["a"] * 3])
def test_chance_is_the_mean_over_all_orders(captions):
    for k in (1, 2, 5):
        hits = [
            any(captions[j] == captions[i] for j in order[:k])
            for order in permutations(range(len(captions)))
            for i in range(len(captions))
        ]
        found = chance(belonging(set_of(captions)), (k,))
        assert found["text_to_image"] == found["image_to_text"]
        assert found["text_to_image"][f"R@{k}"] == pytest.approx(np.mean(hits))


def test_histograms_are_shares():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    images[0, 0, :2] = 255
    found = color_histograms(images, bins=4)
    assert found.shape == (2, 4, 4, 4)
    assert found[0, 3, 0, 0] == found[0, 0, 0, 0] == 0.5
    assert found[1, 0, 0, 0] == 1
    with pytest.raises(ValueError, match=r"images: got torch.float32, expected torch\.uint8"):
        color_histograms(images.float())


def test_rare_words_weigh_more():
    captions = ["a red square", "a red circle", "a blue circle"]
    words = WordTokenizer.train(captions)
    row = TfIdf(captions, words)(["a red blue unseen"])[0]
    assert np.linalg.norm(row) == pytest.approx(1)
    a, red, blue = (row[words.encode(w)[1]] for w in ("a", "red", "blue"))
    assert a < red < blue


def test_cca_finds_what_two_views_share():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(400, 4))
    views = [
        np.concatenate([shared, rng.normal(size=(400, 3))], 1) @ rng.normal(size=(7, 7))
        for _ in range(2)
    ]
    cca = CCA.fit(*(v[:300] for v in views), ridge=1e-6)
    image, text = (cca.project(k, v[300:]) for k, v in enumerate(views))
    assert recalls(image, text, torch.eye(100) > 0)["text_to_image"]["R@1"] > 0.9


def test_evaluate_has_the_model_and_both_baselines(trained_run):
    from mbm_kernels.captioning import checkpoint
    from mbm_kernels.captioning.kinds import TWO_TOWER

    found = checkpoint.load(trained_run, layers="stock", kind=TWO_TOWER)
    sets = {"train": distinct(), "val": colours(12)}
    table = evaluate(found.model, sets, found.tokenizer, ["val"])
    assert set(table) == {"val"}
    assert set(table["val"]) == {"two_tower", "colour_words_cca", "chance"}
    assert table["val"]["two_tower"]["text_to_image"]["R@1"] == 1.0
    assert table["val"]["chance"]["image_to_text"]["R@1"] == pytest.approx(1 / 6)
    assert as_text(table).count("\n") == 5


def test_the_baseline_tells_colours_apart():
    train_set = distinct()
    words = WordTokenizer.train(train_set.captions)
    image, text = HistogramCCA(train_set, words).embed_set(train_set)
    assert recalls(image, text, belonging(train_set))["text_to_image"]["R@1"] == 1.0


def test_texts_embed_as_captions_do():
    train_set = distinct()
    words = WordTokenizer.train(train_set.captions)
    model = TwoTower(words.vocab_size, config=SMALL, layers="stock").eval()
    model.config = SMALL  # of images of another size than its own default
    texts = embed_texts(model, train_set.captions, words)
    with torch.no_grad():
        for caption, row in zip(train_set.captions, texts, strict=True):
            alone = model.embed_texts(torch.tensor([words.encode(caption)]))[0]
            torch.testing.assert_close(row, alone)
    with pytest.raises(ValueError, match="got 'zebra', which has no word that the model knows"):
        embed_texts(model, ["zebra"], words)


def test_embed_set_keeps_the_order(trained_run):
    from mbm_kernels.captioning import checkpoint
    from mbm_kernels.captioning.kinds import TWO_TOWER

    found = checkpoint.load(trained_run, layers="stock", kind=TWO_TOWER)
    image, text = embed_set(found.model, distinct(), found.tokenizer)
    assert (image @ text.T).argmax(1).tolist() == list(range(6))
