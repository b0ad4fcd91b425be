"""The teacher of a distillation: one source of it, and what its tensors must be."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import checks
from mbm_kernels.ops.linear_head import targets

NAME = "linear_distillation_loss"
# Rounding in bfloat16 moves the sum of a teacher's probabilities by less than this.
MASS_SLACK = 0.05


def check(
    linear: Sequence[Any], logits: Any, topk: Any, lead: torch.Size, classes: int
) -> tuple[str, int]:
    """Which source is given, and its hidden size, 0 where it has none.

    `linear` are the teacher's hidden states, weight and bias.
    """
    hidden, weight, bias = linear
    source = _check_source(hidden, weight, bias, logits, topk)
    if source == "teacher_hidden":
        return source, _check_linear(hidden, weight, bias, lead, classes)
    if source == "teacher_logits":
        checks.tensor(NAME, "teacher_logits", logits)
        _check_rows("teacher_logits", logits, "..., V", lead, classes)
    else:
        _check_topk(topk, lead, classes)
    return source, 0


def _check_source(hidden: Any, weight: Any, bias: Any, logits: Any, topk: Any) -> str:
    sources = {"teacher_hidden": hidden, "teacher_logits": logits, "teacher_topk": topk}
    present = [name for name, value in sources.items() if value is not None]
    if len(present) != 1:
        got = " and ".join(present) if present else "none"
        expected = "exactly one of teacher_hidden with teacher_weight, teacher_logits, teacher_topk"
        checks.fail(NAME, "teacher", got, expected, "leave the others None")
    if hidden is not None:
        if weight is None:
            expected = "teacher_hidden with teacher_weight"
            checks.fail(NAME, "teacher_weight", None, expected, "give the teacher's head [V, Ht]")
        return "teacher_hidden"
    for name, value in (("teacher_weight", weight), ("teacher_bias", bias)):
        if value is not None:
            expected = f"None beside {present[0]}"
            checks.fail(NAME, name, "a tensor", expected, "it belongs to teacher_hidden")
    return present[0]


def _check_linear(hidden: Any, weight: Any, bias: Any, lead: torch.Size, classes: int) -> int:
    """The teacher's hidden size Ht."""
    hidden = checks.tensor(NAME, "teacher_hidden", hidden)
    weight = checks.tensor(NAME, "teacher_weight", weight, 2)
    features: int = weight.size(1)
    _check_rows("teacher_hidden", hidden, "..., Ht", lead, features)
    _check_vocabulary("teacher_weight", weight, weight.size(0), classes)
    if bias is not None:
        checks.tensor(NAME, "teacher_bias", bias, 1)
        checks.shape(NAME, "teacher_bias", bias, "V", (classes,))
    return features


def _check_vocabulary(name: str, value: Tensor, got: int, classes: int) -> None:
    if got != classes:
        checks.fail(
            NAME,
            name,
            f"shape {list(value.shape)}, a vocabulary of {got}",
            f"the student's vocabulary V = {classes}",
            "bring the teacher to the student's ids first, as by teacher_weight[ids]",
        )


def _check_rows(name: str, value: Tensor, letters: str, lead: torch.Size, last: int) -> None:
    if letters == "..., V" and value.dim() > 0 and value.shape[:-1] == lead:
        _check_vocabulary(name, value, value.size(-1), last)
    checks.shape(NAME, name, value, letters, (*lead, last))


def _check_topk(topk: Any, lead: torch.Size, classes: int) -> None:
    if not isinstance(topk, (tuple, list)) or len(topk) != 2:
        got = f"{type(topk).__name__} of {len(topk)}" if hasattr(topk, "__len__") else repr(topk)
        remedy = "give logits.log_softmax(-1).topk(k)[::-1]"
        checks.fail(NAME, "teacher_topk", got, "(ids, log-probabilities)", remedy, TypeError)
    ids = checks.tensor(NAME, "teacher_topk's ids", topk[0])
    log_probs = checks.tensor(NAME, "teacher_topk's log-probabilities", topk[1])
    if ids.dtype != torch.int64:
        remedy = "convert them with .long(); ids come first, log-probabilities second"
        checks.fail(NAME, "teacher_topk's ids", ids.dtype, "int64", remedy, TypeError)
    k = ids.size(-1) if ids.dim() else 0
    checks.shape(NAME, "teacher_topk's ids", ids, "..., k", (*lead, k))
    checks.shape(NAME, "teacher_topk's log-probabilities", log_probs, "..., k", (*lead, k))
    if not 1 <= k <= classes:
        expected = f"1 <= k <= V = {classes}"
        checks.fail(NAME, "teacher_topk", f"k = {k}", expected, "keep at least one id, at most all")


def check_topk_values(ids: Tensor, log_probs: Tensor, keep: Tensor, classes: int) -> None:
    if not (checks.values_readable(ids) and checks.values_readable(log_probs)):
        return
    ids, log_probs = ids[keep], log_probs.detach()[keep]
    if ids.numel() == 0:
        return
    targets.check_range(NAME, "id", ids, classes)
    mass = log_probs.double().exp().sum(-1)
    if bool((mass > 1 + MASS_SLACK).any()):
        got = f"probabilities that sum to {float(mass.max()):.3g}"
        remedy = "give log_softmax of the teacher's logits over all V, at temperature 1"
        checks.fail(NAME, "teacher_topk's log-probabilities", got, "a sum of at most 1", remedy)
