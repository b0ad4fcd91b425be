"""What the losses' Triton backends share: rows in chunks, a head's gradients."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mbm_kernels.ops.linear_head.matmul import product

# One chunk up to this many bytes of logits: near the 50 MB of an H100's L2 cache, and few launches.
CHUNK_BYTES = 128 * 2**20
# Fewer rows leave a GEMM's tiles idle: 64-row chunks made a peer slower than plain torch.
FEWEST_ROWS = 1024
# float16 gradients are made for a gradient of 16 and scaled in float32: below 6e-8 it holds none.
HALF_FACTOR = 16.0


def chunks(rows: int, row_bytes: int) -> Iterator[slice]:
    """Rows in parts of nearly equal size: within CHUNK_BYTES, but of FEWEST_ROWS at least."""
    within = -(-rows * row_bytes // CHUNK_BYTES)
    count = max(1, min(within, rows // FEWEST_ROWS))
    step = -(-rows // count)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, max(step, 1)))


def shares(
    grad: Tensor | None, target: Tensor, ignore_index: int, reduction: str
) -> tuple[Tensor | None, Tensor | None]:
    """(each row's share of the loss's gradient, rows that count), on the device.

    The share is [N], or one number, or None for 1; the gradient is 1 where `grad` is None. Rows are
    counted for the mean alone.
    """
    if reduction != "mean":
        return grad, None
    count = (target != ignore_index).sum()
    share = count.clamp_min(1).reciprocal()  # float32
    return (share if grad is None else grad * share), count


def reduced(rows: Tensor, count: Tensor | None, reduction: str) -> Tensor:
    """Losses [N], 0 where ignored, to the reduction asked for."""
    if reduction == "none":
        return rows
    return rows.sum() if count is None else rows.sum() / count


def empty_where(inputs: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Uninitialised float32 for the gradient of each input that is wanted, None for the others."""
    return [
        x.new_empty(x.shape, dtype=torch.float32) if x is not None and needed else None
        for x, needed in zip(inputs, wanted, strict=True)
    ]


class HeadGradients:
    """The gradients of hidden [N, H], weight [V, H] and bias [V], added up over chunks of rows.

    Args:
        wanted: float32 of those shapes, uninitialised; None where not wanted.
        dtype: of the logits' gradients, the inputs' own.
        share: as from `shares`; see `in_kernel`.
        ignored: bool [N], rows that are not read: their gradients of the logits must be 0, and
            whatever hidden and weight hold, even NaN, stays out of all sums. None for no row.
    """

    def __init__(
        self,
        wanted: Sequence[Tensor | None],
        dtype: torch.dtype,
        share: Tensor | None,
        ignored: Tensor | None = None,
    ):
        self.ignored = None if ignored is None else ignored.unsqueeze(1)
        self.hidden, self.weight, self.bias = wanted
        self.dtype = dtype
        self.late = dtype == torch.float16 and (share is None or share.dim() == 0)
        self.share = share
        self.begun = False

    @property
    def wanted(self) -> tuple[Tensor | None, ...]:
        return self.hidden, self.weight, self.bias

    @property
    def any(self) -> bool:
        return any(x is not None for x in self.wanted)

    @property
    def in_kernel(self) -> tuple[Tensor | None, float]:
        """The share and the factor by which a kernel multiplies what it writes."""
        return (None, HALF_FACTOR) if self.late else (self.share, 1.0)

    def room(self, logits: Tensor) -> Tensor | None:
        """Where the gradients of logits [M, V] are written: over them, rows equally far apart."""
        if not self.any:
            return None
        return (
            logits if self.dtype == torch.float32 else logits.view(self.dtype)[:, : logits.size(1)]
        )

    def add(self, rows: slice, grad: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Joins the chunk `rows`: grad [M, V] of its logits, hidden [M, H], weight [V, H]."""
        if self.hidden is not None:
            product(grad, weight, out=self.hidden[rows])
        if self.weight is not None:
            if self.ignored is not None:
                hidden = hidden.masked_fill(self.ignored[rows], 0)
            product(grad.t(), hidden, out=self.weight, add=self.begun)
        if self.bias is not None:
            by_bias = grad.sum(0, dtype=torch.float32)
            self.bias.add_(by_bias) if self.begun else self.bias.copy_(by_bias)
        self.begun = True

    def finish(self) -> None:
        """Zeros where there was no row, and the share of what was made without it."""
        for grad in self.wanted:
            if grad is None:
                continue
            if not self.begun:
                grad.zero_()
            elif self.late:
                grad.mul_(1 / HALF_FACTOR)
                if self.share is not None:
                    grad.mul_(self.share)
        if self.hidden is not None and self.ignored is not None:
            self.hidden.masked_fill_(self.ignored, 0)
