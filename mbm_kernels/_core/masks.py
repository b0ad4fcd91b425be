"""Masks and lengths of attention, for the plain-torch backends."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mbm_kernels._core import checks, tracing


def attend_mask(
    mask: Tensor | None, key_lengths: Tensor | None, positions: int, device: torch.device
) -> Tensor | None:
    """`mask` AND position < key_lengths[b], True = attend; None where both are None.

    Args:
        mask: bool, broadcastable to [B, ..., S].
        key_lengths: int64 [B].
        positions: S.
        device: of the scores; lengths may be elsewhere.

    Returns:
        bool, broadcastable to [B, ..., S]; three-dimensional where `mask` has fewer dimensions.
    """
    if key_lengths is None:
        return mask
    inside = torch.arange(positions, device=device) < key_lengths.to(device)[:, None]
    if mask is None:
        return inside[:, None, :]
    between = max(mask.dim(), 3) - 2
    return mask & inside.view(inside.size(0), *(1,) * between, positions)


@dataclass(frozen=True, slots=True)
class Hiding:
    """What a problem says of its mask and of whether it has lengths; false where it has neither."""

    shape: tuple[int, ...] | None
    strides: tuple[int, ...] | None
    dtype: torch.dtype | None
    lengths: bool

    @classmethod
    def of(cls, key_lengths: Tensor | None, mask: Tensor | None) -> "Hiding":
        if mask is None:
            return cls(None, None, None, key_lengths is not None)
        return cls(tuple(mask.shape), mask.stride(), mask.dtype, key_lengths is not None)

    def __bool__(self) -> bool:
        return self.lengths or self.shape is not None

    def expanded_strides(self, rank: int, strides: Sequence[int] | None = None) -> tuple[int, ...]:
        """Strides, those given or its own, of the mask expanded to `rank` dimensions: 0 where it is
        broadcast, and without one."""
        strides = self.strides if strides is None else strides
        if self.shape is None or strides is None:
            return (0,) * rank
        own = (0 if n == 1 else stride for n, stride in zip(self.shape, strides, strict=True))
        return (*(0,) * (rank - len(self.shape)), *own)


def check(
    op: str,
    key_lengths: Tensor | None,
    mask: Tensor | None,
    query: Tensor,
    letters: str,
    sizes: Sequence[int],
    floating: bool = False,
) -> None:
    """Whether lengths and mask fit scores of `sizes`, which `letters` name; no value is read.

    Raises:
        TypeError: one is not a tensor of the right kind.
        ValueError: shapes or devices do not fit.
    """
    if key_lengths is not None:
        checks.lengths_kind(op, "key_lengths", key_lengths, sizes[0], query)
    if mask is not None:
        checks.mask(op, "mask", mask, letters, sizes, floating)
        checks.same_device(op, "mask", mask, "query", query)


def check_lengths(op: str, key_lengths: Tensor | None, positions: int) -> None:
    """Their values, which no problem tells of: at each call."""
    if key_lengths is not None:
        checks.length_values(op, "key_lengths", key_lengths, positions, "S")


def readable(tensors: Sequence[Tensor | None]) -> bool:
    """Whether looking at values is free: real CPU tensors, nothing tracing."""
    given = [x for x in tensors if x is not None]
    return tracing.is_plain(given) and all(checks.values_readable(x) for x in given)


def all_finite(*tensors: Tensor) -> bool:
    """Whether no element is NaN or infinite; may deny it where a sum overflows. One pass each."""
    with torch.no_grad():
        for x in tensors:
            single = x.dtype in (torch.bfloat16, torch.float16)
            total = x.sum(dtype=torch.float32) if single else x.sum()
            if not bool(torch.isfinite(total)):
                return False
    return True


def unread(
    query: Tensor, key: Tensor, value: Tensor, attend: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """0 in queries that attend to nothing, and in keys and values that no query attends to.

    Whatever they hold, even a NaN, then meets no weight of 0, and their gradients are 0.

    Args:
        query: [..., T, D].
        key: [..., S, D].
        value: [..., S, E].
        attend: bool, broadcastable to [..., T, S], with as many dimensions.
    """
    hidden = ~attend.any(-2).unsqueeze(-1)
    nothing = ~attend.any(-1, keepdim=True)
    return query.masked_fill(nothing, 0), key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)


def constant_where_empty(context: Tensor, attend: Tensor, looks: bool) -> Tensor:
    """`context` [..., T, E], whose rows that attend to nothing are a constant 0, whatever gradient
    arrives for them; `looks`: whether `attend` may be looked at."""
    nothing = ~attend.any(-1, keepdim=True)
    if looks and not bool(nothing.any()):
        return context
    return context.masked_fill(nothing, 0)


def softmax(scores: Tensor, attend: Tensor) -> Tensor:
    """softmax over the last dimension where `attend`, 0 elsewhere; a row of it may be empty."""
    nothing = ~attend.any(-1, keepdim=True)
    elsewhere = torch.zeros_like(nothing, dtype=scores.dtype).masked_fill(~nothing, -torch.inf)
    return torch.softmax(torch.where(attend, scores, elsewhere), -1).masked_fill(~attend, 0)
