"""The problem descriptor of a contrastive loss."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import checks
from mbm_kernels._core.problem import Problems

NAME = "contrastive_loss"
KINDS = ("infonce", "siglip")


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """What follows from the shapes, strides, dtypes and the kind of a call."""

    kind: str
    device: torch.device
    dtype: torch.dtype
    dtypes: tuple[torch.dtype | None, ...]  # of image, text, scale and bias
    shapes: tuple[tuple[int, ...] | None, ...]
    sizes: dict[str, int]
    derived: dict[Any, Any] = field(default_factory=dict)  # by backends, under keys of their own

    @property
    def options(self) -> tuple[str]:
        """As the registered operation takes them."""
        return (self.kind,)


def build(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, kind: str) -> Problem:
    """The problem of arguments in the registered operation's form, shapes checked."""
    tensors = (image, text, scale, bias)
    check_shapes(image, text)
    for name, value in (("scale", scale), ("bias", bias)):
        if value is not None:
            checks.tensor(NAME, name, value, 0)
    return Problem(
        kind=kind,
        device=image.device,
        dtype=image.dtype,
        dtypes=tuple(None if x is None else x.dtype for x in tensors),
        shapes=tuple(None if x is None else tuple(x.shape) for x in tensors),
        sizes={"B": image.size(0), "D": image.size(1), "siglip": int(kind == "siglip")},
    )


def check_shapes(image: Any, text: Any) -> None:
    """Whether they are [B, D], both."""
    image = checks.tensor(NAME, "image", image, 2)
    text = checks.tensor(NAME, "text", text, 2)
    checks.shape(NAME, "text", text, "B, D", tuple(image.shape))


PROBLEMS: Problems[Problem] = Problems(build, inputs=4)
find = PROBLEMS.find
