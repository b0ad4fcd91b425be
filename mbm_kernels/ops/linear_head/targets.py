"""Class targets with ignored rows, for the losses: checks, compaction and reductions."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_kernels._core import checks, native

REDUCTIONS = ("none", "mean", "sum")


def check_target(
    op: str, target: object, lead: Sequence[int], classes: int, ignore_index: int, like: Tensor
) -> Tensor:
    """int64 of shape `lead`, 0 <= target < V or equal to ignore_index, on the device of `like`."""
    checks.index(op, "ignore_index", ignore_index)
    value = check_kind(op, target, lead, like)
    check_values(op, value, classes, ignore_index)
    return value


def check_kind(op: str, target: object, lead: Sequence[int], like: Tensor) -> Tensor:
    """int64 of shape `lead` on the device of `like`."""
    value = checks.tensor(op, "target", target)
    if value.dtype != torch.int64:
        checks.fail(op, "target", value.dtype, "int64", "convert it with .long()", TypeError)
    if tuple(value.shape) != tuple(lead):
        expected = f"[...] = {list(lead)}, the leading dimensions of the hidden states"
        checks.fail(op, "target", f"shape {list(value.shape)}", expected, "reshape it")
    if value.device != like.device:
        remedy = "move it with .to(...)"
        checks.fail(op, "target", value.device, f"{like.device} as the hidden states", remedy)
    return value


def check_values(op: str, target: Tensor, classes: int, ignore_index: int) -> None:
    """Classes or ignore_index, where their values can be read."""
    if target.numel() > 0 and checks.values_readable(target):
        low, high, _ = native.index_range(target, ignore_index)
        if low < 0 or high >= classes:
            check_range(op, "target", target, classes, ignore_index)


def check_range(
    op: str, name: str, value: Tensor, classes: int, ignore_index: int | None = None
) -> None:
    low, high = (int(v) for v in torch.aminmax(value))
    if low >= 0 and high < classes:
        return
    wrong = outside(value, classes)
    if ignore_index is not None:
        wrong &= value != ignore_index
    if bool(wrong.any()):
        unless = "" if ignore_index is None else f" or ignore_index = {ignore_index}"
        got = f"the value {int(value[wrong][0])}"
        checks.fail(op, name, got, f"0 <= {name} < V = {classes}{unless}", "correct the ids")


def ignored_rows(named: dict[str, Any]) -> Tensor:
    """bool [N], of a loss's inputs by name."""
    return named["target"] == named["ignore_index"]


def outside(index: Tensor, classes: int) -> Tensor:
    """bool: which of these indices are no class."""
    return (index < 0) | (index >= classes)


def within(
    target: Tensor, ids: Tensor | None, classes: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Target [...] and ids [..., k] with 0 for what is no class, and which rows that concerns."""
    unknown = outside(target, classes)
    target = target.masked_fill(unknown, 0)
    if ids is None:
        return target, None, unknown
    wrong = outside(ids, classes)
    return target, ids.masked_fill(wrong, 0), unknown | wrong.any(-1)


def unlooked(
    hidden: Tensor, target: Tensor, ignore_index: int, classes: int, ids: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, target and ids for a definition that trusts its indices.

    They become classes, and a row with a wrong one NaN.
    """
    keep = target != ignore_index
    inside, safe_ids, unknown = within(target, ids, classes)
    unknown = unknown & keep
    if checks.values_readable(target) and not bool(unknown.any()):
        return hidden, target, ids
    factor = torch.ones_like(hidden[..., :1]).masked_fill(unknown.unsqueeze(-1), torch.nan)
    return hidden * factor, torch.where(keep, inside, target), safe_ids


class Rows:
    """The rows of target [N] that count, for plain torch.

    Where the target can be read without synchronisation the others are left out: one gather of
    [M, H] saves their share of the GEMM and of every pass over [N, V]. Elsewhere all rows are
    computed; of the ignored ones zeros stand for whatever they hold, even a NaN, and a row with an
    index that is no class becomes NaN, gradients too, as in the kernels.

    Attributes:
        target: int64 [M] or [N], classes, but where the target can be read and is wrong.
        ids: as `target`, [M, k] or [N, k]; None without.
    """

    def __init__(self, target: Tensor, ignore_index: int, classes: int, ids: Tensor | None = None):
        self.count = target.numel()
        self.kept: Tensor | None = None
        self.ignored: Tensor | None = None
        self.unknown: Tensor | None = None
        self.target, self.ids, self.ignore_index = target, ids, ignore_index
        if checks.values_readable(target):
            if native.index_range(target, ignore_index)[2] > 0:
                self.kept = (target != ignore_index).nonzero().squeeze(1)
                self.target = target.index_select(0, self.kept)
                self.ids = None if ids is None else ids.index_select(0, self.kept)
            return
        keep = target != ignore_index
        self.ignored = ~keep
        self.target, self.ids, unknown = within(target, ids, classes)
        self.unknown = unknown & keep

    def of(self, x: Tensor) -> Tensor:
        """Rows [N, ...] to compute with."""
        if self.kept is not None:
            return x.index_select(0, self.kept)
        return x if self.ignored is None else x.masked_fill(self.ignored.unsqueeze(1), 0)

    def reduce(self, losses: Tensor, reduction: str) -> Tensor:
        """Losses of the rows computed to the reduction; the mean over no row at all is NaN."""
        if self.ignored is None or self.unknown is None:
            if reduction == "none":
                return self.spread(losses)
            return losses.mean() if reduction == "mean" else losses.sum()
        losses = losses * torch.ones_like(losses).masked_fill(self.unknown, torch.nan)
        losses = losses.masked_fill(self.ignored, 0)
        if reduction == "none":
            return losses
        total = losses.sum()
        return total / (~self.ignored).sum() if reduction == "mean" else total

    def spread(self, losses: Tensor) -> Tensor:
        """Losses of the rows computed as [N], 0 elsewhere."""
        if self.kept is None:
            return losses
        return losses.new_zeros(self.count).index_copy(0, self.kept, losses)

    def cross_entropy(
        self,
        logits: Tensor,
        reduction: str,
        label_smoothing: float = 0.0,
        log_probs: Tensor | None = None,
    ) -> Tensor:
        """Of the rows computed; by `log_probs`, the logits' log_softmax, where there is one."""

        def loss(reduction: str, ignore_index: int = -100) -> Tensor:
            named: Any = {"reduction": reduction, "ignore_index": ignore_index}
            if log_probs is not None:
                return F.nll_loss(log_probs, self.target, **named)
            return F.cross_entropy(logits, self.target, label_smoothing=label_smoothing, **named)

        if self.ignored is not None:
            # Without classes every row is ignored or unknown.
            return self.reduce(loss("none") if logits.size(1) else logits.sum(1), reduction)
        found = loss(reduction, ignore_index=self.ignore_index)
        return self.spread(found) if reduction == "none" else found


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
