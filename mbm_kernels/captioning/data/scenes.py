"""Drawn scenes of one to three shapes, each with the one caption that fits.

Canonical: of two shapes the large one is named first; of two equal ones the left one, or the upper
one. Of three, two stand in a row (or column) and the third lies centred above or below (left or
right of) both: "a large red star left of a small blue circle, both above a small pink cross".
So each image has one right caption, and exact match is a fair measure.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from .base import CaptionSet
from .shapes import SHAPES

SHAPE_NAMES = tuple(SHAPES)
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 38, 38),
    "orange": (245, 140, 24),
    "yellow": (244, 222, 50),
    "green": (46, 158, 62),
    "blue": (40, 84, 214),
    "purple": (130, 50, 168),
    "pink": (250, 140, 190),
    "cyan": (80, 205, 218),
}
COLOUR_NAMES = tuple(COLOURS)
SIZES = ("small", "large")
# Relation of the first-named shape to the second, by (axis, first has the greater coordinate).
RELATIONS = (("left of", "right of"), ("above", "below"))
# Nominal radius in pixels of a 64-pixel image: the gap of 3.6 keeps the sizes apart.
RADIUS = {"small": (6.2, 7.2), "large": (10.8, 12.0)}
# A dark contour, in pixels outside and inside the edge at any size of image. It shows the shape
# whatever the colour: without it a model names a shape by its colour and calls each held-out pair
# by a pair it knows.
CONTOUR = (0.7, 0.5)
CONTOUR_LEVEL = 44
# (shape, colour) never drawn in train and val: each colour once, each shape at most twice.
HELD_OUT = tuple((k % len(SHAPE_NAMES), k) for k in range(len(COLOUR_NAMES)))
SPLITS = {"train": 12_000, "val": 1_000, "held_out": 1_000}
COUNT_PROBABILITY = (0.36, 0.37, 0.27)
REACH = 1.2  # of the radius, from the centre to the farthest tip
BLOCK = 250  # images per random stream: `limit` begins only the blocks that it needs

_PAIRS = [(s, c) for s in range(len(SHAPE_NAMES)) for c in range(len(COLOUR_NAMES))]
_SEEN = np.array([pair for pair in _PAIRS if pair not in HELD_OUT])  # [32, 2]
_UNSEEN = np.array(HELD_OUT)  # [8, 2]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Block:
    """N images of up to 3 shapes, in the order of naming; unused places hold count <= k."""

    count: Ints  # [N], 1..3
    shape: Ints  # [N, 3]
    colour: Ints  # [N, 3]
    size: Ints  # [N, 3], 0 small, 1 large
    radius: Floats  # [N, 3], pixels of a 64-pixel image
    centre: Floats  # [N, 3, 2], x right and y down
    axis: Ints  # [N], of the first two: 0 row, 1 column
    first_greater: Ints  # [N], the first-named is right of or below the second
    third_greater: Ints  # [N], the third is below or right of both

    def first(self, count: int | None) -> _Block:
        return _Block(**{name: values[:count] for name, values in vars(self).items()})


def splits(
    *, seed: int = 0, image_size: int = 64, limit: int | None = None
) -> dict[str, CaptionSet]:
    """`train`, `val` and `held_out`; see `load`."""
    out = {}
    for index, (split, full) in enumerate(SPLITS.items()):
        total = full if limit is None else min(full, limit)
        images: list[npt.NDArray[np.uint8]] = []
        captions: list[str] = []
        for block_index in range(-(-total // BLOCK)):
            rng = np.random.default_rng([seed, index, block_index])
            block = _sample(rng, BLOCK, held_out=split == "held_out")
            count = min(BLOCK, total - len(captions))
            images.append(_draw(rng, block, image_size, count))
            captions += [_caption(block, row) for row in range(count)]
        out[split] = CaptionSet(
            images=torch.from_numpy(np.concatenate(images)),
            captions=captions,
            ids=[f"{split}/{k:06d}" for k in range(total)],
        )
    return out


def _sample(rng: np.random.Generator, n: int, *, held_out: bool) -> _Block:
    count = 1 + np.searchsorted(np.cumsum(COUNT_PROBABILITY[:2]), rng.random(n), side="right")
    # Three different seen pairs per image: the order of random keys draws without replacement.
    pair = _SEEN[np.argsort(rng.random((n, len(_SEEN))), axis=1)[:, :3]]  # [N, 3, 2]
    unseen = _UNSEEN[rng.integers(len(_UNSEEN), size=n)]
    place = rng.integers(0, count)
    if held_out:
        pair[np.arange(n), place] = unseen
    size = rng.integers(0, 2, size=(n, 3))
    bounds = np.array([RADIUS[name] for name in SIZES], dtype=np.float32)
    radius = bounds[size, 0] + rng.random((n, 3), dtype=np.float32) * np.diff(bounds)[size, 0]
    axis = rng.integers(0, 2, size=n)
    flip = rng.integers(0, 2, size=n)
    # Equal sizes: the left or upper one is named first.
    first_greater = np.where(size[:, 0] == size[:, 1], 0, flip)
    swap = (size[:, 0] < size[:, 1]) & (count > 1)
    for array in (pair, size, radius):
        array[swap, :2] = array[swap, 1::-1]
    third_greater = rng.integers(0, 2, size=n)
    centre = _place(rng, count, radius, axis, first_greater, third_greater)
    return _Block(
        count=count,
        shape=pair[..., 0],
        colour=pair[..., 1],
        size=size,
        radius=radius,
        centre=centre,
        axis=axis,
        first_greater=first_greater,
        third_greater=third_greater,
    )


def _place(
    rng: np.random.Generator,
    count: Ints,
    radius: Floats,
    axis: Ints,
    first_greater: Ints,
    third_greater: Ints,
) -> Floats:
    """Centres `[N, 3, 2]`, all shapes inside the image, overlapping by a fifth at most."""
    n = len(count)
    along, across = np.zeros((n, 3), np.float32), np.zeros((n, 3), np.float32)
    draw = rng.random((n, 7), dtype=np.float32)
    sign = np.where(first_greater == 1, -1, 1).astype(np.float32)
    gap = (radius[:, 0] + radius[:, 1]) * (0.80 + 0.55 * draw[:, 0])
    along[:, 1] = sign * gap
    # Off the common line by at most 0.35 of the distance (two shapes), 0.12 (three): the row
    # stays plain and no other two of three line up.
    slack = np.where(count == 3, 0.12, 0.35)
    across[:, 1] = (2 * draw[:, 1] - 1) * slack * gap
    side = np.where(third_greater == 1, 1, -1)
    pair_radius = np.maximum(radius[:, 0], radius[:, 1])
    along[:, 2] = along[:, 1] * (0.5 + 0.2 * (draw[:, 2] - 0.5))
    across[:, 2] = across[:, 1] / 2 + side * (pair_radius + radius[:, 2]) * (
        0.85 + 0.25 * draw[:, 3]
    )
    centre = np.where(
        axis[:, None, None] == 0,
        np.stack([along, across], axis=-1),
        np.stack([across, along], axis=-1),
    )
    used = np.arange(3) < count[:, None]
    reach = np.where(used, REACH * radius + 1, -np.inf)[..., None]
    # Small shapes have room to spare: draw them apart by up to 1.6 where the image allows it.
    extent = np.where(used[..., None], centre, 0).max(axis=1) - np.where(
        used[..., None], centre, 0
    ).min(axis=1)
    fit = (64 - 2 * reach.max(axis=(1, 2))) / np.maximum(extent.max(axis=1), 1)
    spread = np.maximum(2 * draw[:, 6] - 0.8, 0) / 1.2
    centre = centre * (1 + spread * (np.clip(fit, 1, 1.6) - 1))[:, None, None]
    low = np.where(used[..., None], centre - reach, np.inf).min(axis=1)  # [N, 2]
    high = np.where(used[..., None], centre + reach, -np.inf).max(axis=1)
    room = 64 - (high - low)
    placed: Floats = (centre + (room * draw[:, 4:6] - low)[:, None]).astype(np.float32)
    return placed


def _draw(
    rng: np.random.Generator, block: _Block, image_size: int, count: int | None = None
) -> npt.NDArray[np.uint8]:
    """uint8 `[N, 3, Y, X]`, of a count the first so many; each pixel is the background covered by
    the shapes in turn.

    Images are the same whatever the count: numbers are drawn for all of the block, and the pixels'
    noise, which comes row by row, last.
    """
    whole, side = len(block.count), image_size

    def uniform(*shape: int) -> Floats:
        return rng.random((whole, *shape), dtype=np.float32)[:count]

    scale = np.float32(side / 64)
    ticks = (np.arange(side, dtype=np.float32) + 0.5) / scale
    x, y = np.tile(ticks, side), np.repeat(ticks, side)  # [P], P = Y X
    tint = 226 + 22 * uniform(3, 1) + 0 * x
    slope = 14 * (uniform(2, 1) - 0.5)
    canvas = tint + (slope[:, :1] * (x / 32 - 1) + slope[:, 1:] * (y / 32 - 1))
    palette = np.array(list(COLOURS.values()), dtype=np.float32)
    jitter = 30 * (uniform(3, 3) - 0.5)
    # 12 degrees at most: a square stays a square and a cross a cross.
    turn = np.float32(0.21) * (2 * uniform(3) - 1)
    order = rng.random((whole, 3))[:count].argsort(axis=1)  # which of two that overlap is on top
    block = block.first(count)
    n = len(block.count)
    fill = palette[block.colour] + jitter  # [N, 3 shapes, 3]
    for layer in range(3):
        k = order[:, layer]
        for shape, distance in enumerate(SHAPES.values()):
            rows = np.flatnonzero((block.shape[np.arange(n), k] == shape) & (k < block.count))
            if not len(rows):
                continue
            which = k[rows]
            centre = block.centre[rows, which]
            cos = np.cos(turn[rows, which])[:, None]
            sin = np.sin(turn[rows, which])[:, None]
            dx, dy = x - centre[:, :1], y - centre[:, 1:]
            signed = distance(
                cos * dx + sin * dy, cos * dy - sin * dx, block.radius[rows, which][:, None]
            )
            paints = (np.float32(CONTOUR_LEVEL), fill[rows, which][..., None])
            for edge, paint in zip((CONTOUR[0], -CONTOUR[1]), paints, strict=True):
                cover = np.clip(0.5 - signed * scale + edge, 0, 1)[:, None]  # [M, 1, P]
                canvas[rows] += cover * (paint - canvas[rows])
    canvas += 10 * (rng.random(canvas.shape, dtype=np.float32) - 0.5)
    pixels: npt.NDArray[np.uint8] = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    return pixels.reshape(n, 3, side, side)


def _caption(block: _Block, row: int) -> str:
    names = [
        f"a {SIZES[s]} {COLOUR_NAMES[c]} {SHAPE_NAMES[f]}"
        for s, c, f in zip(block.size[row], block.colour[row], block.shape[row], strict=True)
    ]
    axis = block.axis[row]
    text = names[0]
    if block.count[row] > 1:
        text += f" {RELATIONS[axis][block.first_greater[row]]} {names[1]}"
    if block.count[row] > 2:
        # The pair is above, or left of, a third that has the greater coordinate.
        text += f", both {RELATIONS[1 - axis][1 - block.third_greater[row]]} {names[2]}"
    return text
