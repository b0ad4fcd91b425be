"""What every data set is: images with captions, and the way from both to a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from .tokenizer import WordTokenizer


@dataclass(frozen=True)
class CaptionSet:
    """Images with captions; its length is the number of captions.

    images: uint8 `[M, 3, Y, X]`, RGB. captions: N strings, lower case. ids: M unique strings.
    image_of: int64 `[N]`, the image of each caption, ascending and without gaps; None where each
    image has one caption, N = M. checksum: of the content of the user's own data, else None.
    source: the name or path that it was loaded by. columns: what else an objective takes of each
    caption, tensors `[N, ...]` by the names of its arguments.

    Raises:
        ValueError: they disagree in length, or images is no uint8 `[M, 3, Y, X]`.
    """

    images: torch.Tensor
    captions: list[str]
    ids: list[str]
    image_of: torch.Tensor | None = None
    checksum: str | None = None
    source: str | None = None
    columns: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if self.images.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3:
            raise ValueError(
                f"CaptionSet: images: got {self.images.dtype} {list(shape)}, "
                "expected torch.uint8 [N, 3, Y, X]; convert the pictures to 8-bit RGB"
            )
        if self.image_of is not None:
            self._check_image_of(self.image_of)
        elif not shape[0] == len(self.captions) == len(self.ids):
            raise ValueError(
                f"CaptionSet: got {shape[0]} images, {len(self.captions)} captions and "
                f"{len(self.ids)} ids, expected as many of each; give one caption and id per image"
            )
        self._check_columns()

    def _check_columns(self) -> None:
        for name, column in self.columns.items():
            if len(column) != len(self.captions):
                raise ValueError(
                    f"CaptionSet: {name}: got {len(column)} rows, expected {len(self.captions)}; "
                    "give one for each caption"
                )

    def _check_image_of(self, image_of: torch.Tensor) -> None:
        count = len(self.images)
        used = image_of.unique_consecutive().tolist()
        if len(image_of) != len(self.captions) or len(self.ids) != count:
            raise ValueError(
                f"CaptionSet: got {count} images, {len(self.ids)} ids, {len(self.captions)} "
                f"captions and {len(image_of)} entries of image_of, expected an id per image and "
                "an image per caption; leave images without a caption out"
            )
        if used != list(range(count)):
            raise ValueError(
                f"CaptionSet: image_of: got images {used[:8]}, expected 0..{count - 1} in order; "
                "sort the captions by image and leave images without a caption out"
            )

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def references(self) -> list[list[str]]:
        """The captions of each image."""
        if self.image_of is None:
            return [[caption] for caption in self.captions]
        out: list[list[str]] = [[] for _ in self.ids]
        for image, caption in zip(self.image_of.tolist(), self.captions, strict=True):
            out[image].append(caption)
        return out


def normalise(images: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 to float32 -1..1, any shape.

    Raises:
        ValueError: images is not uint8.
    """
    if images.dtype != torch.uint8:
        raise ValueError(
            f"normalise: images: got {images.dtype}, expected torch.uint8; pass the raw pictures"
        )
    return images.to(torch.float32).mul_(1 / 127.5).sub_(1)


def collate(
    caption_set: CaptionSet, indices: Sequence[int] | torch.Tensor, tokenizer: WordTokenizer
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch of the given captions with their images.

    Returns:
        images float32 `[B, 3, Y, X]` from `normalise`; tokens int64 `[B, T]`, each row
        bos ... eos then pad_id; lengths int64 `[B]`, bos and eos counted.

    Raises:
        ValueError: no index given, or one outside the set.
    """
    rows = [int(i) for i in indices]
    if not rows or min(rows) < 0 or max(rows) >= len(caption_set):
        got = "no index" if not rows else f"indices {min(rows)}..{max(rows)}"
        raise ValueError(
            f"collate: got {got}, expected at least one in 0..{len(caption_set) - 1}; "
            "draw the batch from range(len(caption_set))"
        )
    return images_of(caption_set, rows), *texts_of(caption_set, rows, tokenizer)


def images_of(caption_set: CaptionSet, rows: Sequence[int]) -> torch.Tensor:
    """The images of the given captions, float32 `[B, 3, Y, X]` from `normalise`."""
    of = torch.tensor(rows)
    if caption_set.image_of is not None:
        of = caption_set.image_of[of]
    return normalise(caption_set.images[of])


def columns_of(
    caption_set: CaptionSet, rows: Sequence[int], device: torch.device
) -> dict[str, torch.Tensor]:
    """What an objective takes of the given captions beside images and tokens."""
    of = torch.tensor(rows)
    return {name: column[of].to(device) for name, column in caption_set.columns.items()}


def texts_of(
    caption_set: CaptionSet, rows: Sequence[int], tokenizer: WordTokenizer
) -> tuple[torch.Tensor, torch.Tensor]:
    """The given captions as `collate` has them: tokens int64 `[B, T]` and lengths int64 `[B]`."""
    encoded = [tokenizer.encode(caption_set.captions[i]) for i in rows]
    return padded(encoded, tokenizer.pad_id)


def padded(encoded: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts as token ids in one tensor: int64 `[B, T]`, then pad_id; and lengths, int64 `[B]`."""
    rows = [torch.tensor(ids, dtype=torch.int64) for ids in encoded]
    lengths = torch.tensor([len(ids) for ids in encoded], dtype=torch.int64)
    return torch.nn.utils.rnn.pad_sequence(rows, True, pad_id), lengths


def augment(
    images: torch.Tensor,
    generator: torch.Generator | None = None,
    part: tuple[int, int] | None = None,
) -> torch.Tensor:
    """A slightly moved and recoloured copy of each image; never mirrored, captions say "left".

    Shift up to 6 % of the side, scale 0.88..1.12, rotation up to 8 degrees, edges
    repeated; channels mixed by up to 5 %, contrast to white 0.9..1.1, offset up to
    0.08: less than what tells one skin tone from the next.

    Args:
        images: float `[B, 3, Y, X]` in -1..1, from `normalise`.
        generator: source of the random numbers, on the CPU.
        part: (first, total) where the images are rows first ... first + B - 1 of a batch of total,
            for all of which numbers are drawn; each row comes out as in the whole batch.

    Returns:
        The same shape and dtype, clamped to -1..1. The input is left untouched.
    """
    if not images.is_floating_point() or images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(
            f"augment: images: got {images.dtype} {list(images.shape)}, "
            "expected float [B, 3, Y, X]; call normalise first"
        )
    count = images.shape[0]
    first, total = part or (0, count)

    def uniform(reach: float, *shape: int) -> torch.Tensor:
        drawn = torch.rand(total, *shape, generator=generator)[first : first + count]
        return drawn.mul_(2 * reach).sub_(reach).to(images)

    angle, scale, shift = uniform(0.14), 1 + uniform(0.12), uniform(0.12, 2)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = (cos, -sin, shift[:, 0], sin, cos, shift[:, 1])
    theta = torch.stack(rows, dim=1).view(count, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    mix = torch.eye(3).to(images) * (1 + uniform(0.10, 1, 1)) + uniform(0.05, 3, 3)
    # White is the background of the drawings: the mix keeps it white, only the offset moves it.
    recoloured = torch.einsum("bij,bjyx->biyx", mix, moved - 1) + 1 + uniform(0.08, 1, 1, 1)
    return recoloured.clamp_(-1, 1)
