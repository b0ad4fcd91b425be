"""The drawn scenes: what the captions say is what the images show."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest
import torch

from mbm_kernels.captioning import data
from mbm_kernels.captioning.data import scenes

SHAPE = rf"a ({'|'.join(scenes.SIZES)}) ({'|'.join(scenes.COLOURS)}) ({'|'.join(scenes.SHAPES)})"
RELATION = "(left of|right of|above|below)"
GRAMMAR = re.compile(rf"^{SHAPE}(?: {RELATION} {SHAPE}(?:, both {RELATION} {SHAPE})?)?$")
HELD_OUT = {(scenes.SHAPE_NAMES[s], scenes.COLOUR_NAMES[c]) for s, c in scenes.HELD_OUT}


@pytest.fixture(scope="module")
def sets() -> dict[str, data.CaptionSet]:
    return data.load("scenes", limit=1000)


def _pairs(caption: str) -> set[tuple[str, str]]:
    found = re.findall(SHAPE, caption)
    return {(shape, colour) for _, colour, shape in found}


def test_splits_have_the_documented_sizes_and_types(sets: dict[str, data.CaptionSet]) -> None:
    assert list(sets) == ["train", "val", "held_out"]
    for split in sets.values():
        assert split.images.dtype == torch.uint8
        assert tuple(split.images.shape) == (1000, 3, 64, 64)
        assert len(split) == len(split.captions) == len(set(split.ids)) == 1000
    assert scenes.SPLITS["train"] >= 10_000


def test_captions_are_grammatical_and_cover_every_word(sets: dict[str, data.CaptionSet]) -> None:
    for split in sets.values():
        assert [c for c in split.captions if not GRAMMAR.match(c)] == []
    words = set(re.findall(r"\w+", " ".join(sets["train"].captions)))
    assert words == {"a", "of", "both", "left", "right", "above", "below"} | {
        *scenes.SIZES,
        *scenes.COLOURS,
        *scenes.SHAPES,
    }


def test_held_out_pairs_are_a_fifth_and_never_in_training() -> None:
    sets = data.load("scenes", image_size=16)  # captions do not depend on it
    pairs = len(scenes.SHAPES) * len(scenes.COLOURS)
    assert pairs >= 40
    assert len(HELD_OUT) >= 0.2 * pairs
    for split in ("train", "val"):
        seen = set().union(*map(_pairs, sets[split].captions))
        assert not seen & HELD_OUT
        assert len(seen) == pairs - len(HELD_OUT)
    assert all(_pairs(caption) & HELD_OUT for caption in sets["held_out"].captions)
    assert set().union(*map(_pairs, sets["held_out"].captions)) >= HELD_OUT
    # Each colour and each shape of a held-out pair stays common in training.
    text = " ".join(sets["train"].captions)
    for word in (*scenes.COLOURS, *scenes.SHAPES):
        assert text.count(f" {word}") > 2000


def test_same_seed_same_pictures_another_seed_others() -> None:
    first, again = (data.load("scenes", seed=3, limit=20) for _ in range(2))
    other = data.load("scenes", seed=4, limit=20)
    for name in first:
        assert torch.equal(first[name].images, again[name].images)
        assert first[name].captions == again[name].captions
        assert first[name].captions != other[name].captions
    assert first["train"].captions != first["val"].captions


def test_limit_takes_a_prefix(sets: dict[str, data.CaptionSet]) -> None:
    few = data.load("scenes", limit=7)
    for name, split in few.items():
        assert len(split) == 7
        assert split.captions == sets[name].captions[:7]
        assert torch.equal(split.images, sets[name].images[:7])


def test_captions_are_stable_across_versions(sets: dict[str, data.CaptionSet]) -> None:
    text = "\n".join(c for split in sets.values() for c in split.captions)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "8833c6f0c9aaf900"


def _blobs(image: np.ndarray, colour: str) -> np.ndarray:
    """Pixels `[Y, X]` nearer to this colour than to any other, the ground and the contour."""
    palette = np.array([*scenes.COLOURS.values(), (237, 237, 237), (44, 44, 44)], dtype=np.float32)
    distance = ((image.transpose(1, 2, 0)[..., None, :] - palette) ** 2).sum(-1)
    return distance.argmin(-1) == list(scenes.COLOURS).index(colour)


def test_a_picture_decides_colours_relations_and_sizes(sets: dict[str, data.CaptionSet]) -> None:
    checked = 0
    for split in sets.values():
        images = split.images.numpy().astype(np.float32)
        for image, caption in zip(images, split.captions, strict=True):
            match = re.fullmatch(rf"{SHAPE} {RELATION} {SHAPE}", caption)
            if match is None or match[2] == match[6]:
                continue
            size_a, colour_a, shape_a, relation, size_b, colour_b, shape_b = match.groups()
            masks = [_blobs(image, colour_a), _blobs(image, colour_b)]
            # An antialiased rim between two colours may look like a third: shapes have >= 40 px.
            assert min(m.sum() for m in masks) >= 40, caption
            (ya, xa), (yb, xb) = (np.argwhere(m).mean(0) for m in masks)
            along = {"left of": xb - xa, "right of": xa - xb, "above": yb - ya, "below": ya - yb}
            across = abs(ya - yb) if relation in ("left of", "right of") else abs(xa - xb)
            assert along[relation] > 6, caption
            assert along[relation] > 1.5 * across, caption
            if shape_a == shape_b and size_a != size_b:
                assert size_a == "large", caption
                assert masks[0].sum() > 1.6 * masks[1].sum(), caption
            checked += 1
    assert checked > 900


def test_the_first_named_is_the_canonical_one(sets: dict[str, data.CaptionSet]) -> None:
    relations = set()
    for split in sets.values():
        for caption in split.captions:
            match = re.match(rf"{SHAPE} {RELATION} {SHAPE}", caption)
            if match is None:
                continue
            size_a, relation, size_b = match[1], match[4], match[5]
            assert (size_a, size_b) != ("small", "large"), caption
            if size_a == size_b:
                assert relation in ("left of", "above"), caption
            relations.add((size_a == size_b, relation))
    assert len(relations) == 6


def test_third_shape_is_on_the_named_side() -> None:
    block = scenes._sample(np.random.default_rng(0), 5000, held_out=False)
    for row in np.flatnonzero(block.count == 3):
        caption = scenes._caption(block, row)
        side = re.search(rf", both {RELATION}", caption)
        assert side is not None
        (xa, ya), (xb, yb), (xc, yc) = block.centre[row]
        clear = {
            "left of": xc - max(xa, xb),
            "right of": min(xa, xb) - xc,
            "above": yc - max(ya, yb),
            "below": min(ya, yb) - yc,
        }[side[1]]
        assert clear > 8, caption
        # The third stands between the two, so no other two of the three form a row or a column.
        low, high = (
            (min(xa, xb), max(xa, xb)) if side[1] in ("above", "below") else sorted((ya, yb))
        )
        middle = xc if side[1] in ("above", "below") else yc
        assert low + 3 < middle < high - 3, caption


def test_shapes_stay_inside_and_some_overlap() -> None:
    block = scenes._sample(np.random.default_rng(0), 5000, held_out=False)
    used = np.arange(3) < block.count[:, None]
    reach = scenes.REACH * block.radius[..., None] + 1
    assert (block.centre - reach)[used].min() > -0.01
    assert (block.centre + reach)[used].max() < 64.01
    two = block.count > 1
    apart = np.hypot(*(block.centre[two, 0] - block.centre[two, 1]).T)
    touching = apart / block.radius[two, :2].sum(1)
    assert 0.79 < touching.min() < 0.85
    assert 0.1 < (touching < 1).mean() < 0.4


def test_edges_are_antialiased() -> None:
    # A hard edge would jump from the light ground to the contour without a grey between them.
    block = scenes._sample(np.random.default_rng(0), 200, held_out=False)
    block.count[:], block.shape[:] = 1, scenes.SHAPE_NAMES.index("circle")
    block.centre[:] = 24 + 16 * np.random.default_rng(1).random((200, 1, 2))
    images = scenes._draw(np.random.default_rng(0), block, 64).astype(np.float32)
    for image, centre, radius in zip(images, block.centre[:, 0], block.radius[:, 0], strict=True):
        y, x = np.mgrid[:64, :64] + 0.5
        outside = np.hypot(x - centre[0], y - centre[1]) > radius + scenes.CONTOUR[0]
        grey = (image.max(0) < 190) & outside
        assert grey.any()
        assert not (grey & (image.min(0) < scenes.CONTOUR_LEVEL + 10)).any()


def test_contour_surrounds_each_shape_in_the_same_dark_grey() -> None:
    block = scenes._sample(np.random.default_rng(0), 200, held_out=False)
    block.count[:], block.size[:], block.radius[:] = 1, 1, 11
    images = scenes._draw(np.random.default_rng(0), block, 64).astype(np.float32)
    dark = (images < scenes.CONTOUR_LEVEL + 60).all(1).sum((1, 2))
    assert dark.min() > 30


@pytest.mark.parametrize("name", scenes.SHAPE_NAMES)
def test_shapes_are_equally_large(name: str) -> None:
    ticks = np.linspace(-20, 20, 401, dtype=np.float32)
    u, v = np.tile(ticks, 401)[None], np.repeat(ticks, 401)[None]
    for r in (6.0, 11.0):
        inside = scenes.SHAPES[name](u, v, np.full((1, 1), r, np.float32)) < 0
        assert 2.1 < inside.sum() * 0.01 / r**2 < 3.2
        assert np.hypot(u, v)[inside].max() <= 1.4 * r


@pytest.mark.parametrize("size", [32, 96])
def test_image_size_scales_the_picture(size: int) -> None:
    base = data.load("scenes", limit=8)["val"]
    other = data.load("scenes", limit=8, image_size=size)["val"]
    assert other.captions == base.captions
    assert tuple(other.images.shape) == (8, 3, size, size)
    scaled = torch.nn.functional.interpolate(
        base.images.float(), size=(size, size), mode="bilinear", antialias=True
    )
    # The contour alone keeps its width in pixels: at 32, a tenth of all pixels differ by it.
    difference = (scaled - other.images.float()).abs()
    assert difference.median() < 5
    assert difference.mean() < 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "coco"}, "got data set 'coco', expected one of"),
        ({"name": "scenes", "image_size": 4}, "image_size: got 4, expected at least 16"),
        ({"name": "scenes", "limit": 0}, "limit: got 0, expected None or at least 1"),
        ({"name": "scenes", "seed": -1}, "seed: got -1, expected 0 or more"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.load(**arguments)


def test_collate_pads_and_normalises(sets: dict[str, data.CaptionSet]) -> None:
    train = sets["train"]
    tokenizer = data.WordTokenizer.train(train.captions)
    rows = [5, 0, 17, 3]
    images, tokens, lengths = data.collate(train, rows, tokenizer)
    assert images.dtype == torch.float32
    assert tuple(images.shape) == (4, 3, 64, 64)
    torch.testing.assert_close(images, train.images[rows].float() / 127.5 - 1)
    assert tokens.dtype == lengths.dtype == torch.int64
    assert tokens.shape[1] == lengths.max()
    for row, index in enumerate(rows):
        n = int(lengths[row])
        assert tokens[row, 0] == tokenizer.bos_id
        assert tokens[row, n - 1] == tokenizer.eos_id
        assert (tokens[row, n:] == tokenizer.pad_id).all()
        assert tokenizer.decode(tokens[row].tolist()) == train.captions[index]


def test_collate_and_caption_set_refuse_nonsense(sets: dict[str, data.CaptionSet]) -> None:
    tokenizer = data.WordTokenizer.train(sets["val"].captions)
    with pytest.raises(ValueError, match="got no index"):
        data.collate(sets["val"], [], tokenizer)
    with pytest.raises(ValueError, match=r"got indices -1\.\.1000, expected .* 0\.\.999"):
        data.collate(sets["val"], [-1, 1000], tokenizer)
    with pytest.raises(ValueError, match="got 1000 images, 1 captions"):
        data.CaptionSet(images=sets["val"].images, captions=["a"], ids=["b"])
    with pytest.raises(ValueError, match=r"got torch.float32 .* expected torch.uint8"):
        data.CaptionSet(images=torch.zeros(1, 3, 8, 8), captions=["a"], ids=["b"])
    with pytest.raises(ValueError, match=r"normalise: images: got torch.float32"):
        data.normalise(torch.zeros(3, 4, 4))


def test_augment_moves_and_recolours_a_little(sets: dict[str, data.CaptionSet]) -> None:
    images = data.normalise(sets["train"].images[:64])
    before = images.clone()
    first = data.augment(images, torch.Generator().manual_seed(1))
    again = data.augment(images, torch.Generator().manual_seed(1))
    other = data.augment(images, torch.Generator().manual_seed(2))
    assert torch.equal(images, before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == images.shape
    assert first.abs().max() <= 1
    change = (first - images).abs().mean((1, 2, 3))
    assert (change > 0.01).all()
    assert change.mean() < 0.3
    with pytest.raises(ValueError, match=r"augment: images: got torch\.uint8"):
        data.augment(sets["train"].images[:2])
