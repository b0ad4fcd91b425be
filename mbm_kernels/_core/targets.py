"""Class targets with ignored rows, for the losses: checks, compaction and reductions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mbm_kernels._core import checks

REDUCTIONS = ("none", "mean", "sum")


def check_target(
    op: str, target: object, lead: Sequence[int], classes: int, ignore_index: int, like: Tensor
) -> Tensor:
    """int64 of shape `lead`, 0 <= target < V or equal to ignore_index, on the device of `like`."""
    checks.index(op, "ignore_index", ignore_index)
    value = checks.tensor(op, "target", target)
    if value.dtype != torch.int64:
        checks.fail(op, "target", value.dtype, "int64", "convert it with .long()", TypeError)
    if tuple(value.shape) != tuple(lead):
        expected = f"[...] = {list(lead)}, the leading dimensions of the hidden states"
        checks.fail(op, "target", f"shape {list(value.shape)}", expected, "reshape it")
    if value.device != like.device:
        remedy = "move it with .to(...)"
        checks.fail(op, "target", value.device, f"{like.device} as the hidden states", remedy)
    if value.numel() > 0 and checks.values_readable(value):
        check_range(op, "target", value, classes, ignore_index)
    return value


def check_range(
    op: str, name: str, value: Tensor, classes: int, ignore_index: int | None = None
) -> None:
    low, high = (int(v) for v in torch.aminmax(value))
    if low >= 0 and high < classes:
        return
    wrong = (value < 0) | (value >= classes)
    if ignore_index is not None:
        wrong &= value != ignore_index
    if bool(wrong.any()):
        unless = "" if ignore_index is None else f" or ignore_index = {ignore_index}"
        got = f"the value {int(value[wrong][0])}"
        checks.fail(op, name, got, f"0 <= {name} < V = {classes}{unless}", "correct the ids")


def split_rows(target: Tensor, ignore_index: int) -> tuple[Tensor | None, Tensor | None]:
    """How to leave ignored rows out, for target [N].

    Leaving them out of the GEMM costs one gather of [M, H] and saves their share of every pass over
    [N, V]; it is done where reading the target needs no synchronisation.

    Returns:
        kept: int64 [M], the rows to compute, or None for all.
        ignored: bool [N], the rows to mask afterwards, or None for none.
    """
    keep = target != ignore_index
    if not checks.values_readable(target):
        return None, ~keep
    return (None if bool(keep.all()) else keep.nonzero().squeeze(1)), None


def reduce_rows(rows: Tensor, ignored: Tensor | None, reduction: str) -> Tensor:
    """Losses of rows [N] to the reduction asked for; the mean over no row at all is NaN."""
    if ignored is None:
        return rows if reduction == "none" else rows.mean() if reduction == "mean" else rows.sum()
    rows = rows.masked_fill(ignored, 0)
    if reduction == "none":
        return rows
    total = rows.sum()
    return total / (~ignored).sum() if reduction == "mean" else total


def spread_rows(rows: Tensor, kept: Tensor | None, count: int) -> Tensor:
    """Losses [M] of the rows `kept` as [N], 0 elsewhere."""
    return rows if kept is None else rows.new_zeros(count).index_copy(0, kept, rows)


def gradients_to_make(
    inputs: Sequence[Tensor | None], save: Sequence[bool], reduction: str
) -> list[Tensor]:
    """Room, in float32, for the gradients that a forward makes (see _core/op.py); empty where not.

    A loss without reduction gets a gradient for each row, which only its backward knows.
    """
    like = next(x for x in inputs if x is not None)
    return [
        like.new_empty(
            x.shape if x is not None and wanted and reduction != "none" else (0,),
            dtype=torch.float32,
        )
        for x, wanted in zip(inputs, save, strict=True)
    ]
