"""The problem descriptor of distillation through a linear head."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mbm_kernels._core import checks
from mbm_kernels._core.problem import Problems
from mbm_kernels.ops.linear_distillation_loss import teacher
from mbm_kernels.ops.linear_distillation_loss.teacher import NAME
from mbm_kernels.ops.linear_head import head, targets

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


class Inputs(NamedTuple):
    """In the order of the schema; rows are flat: [N, ...]."""

    student_hidden: Tensor
    student_weight: Tensor
    target: Tensor
    student_bias: Tensor | None
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    teacher_logits: Tensor | None
    teacher_topk_ids: Tensor | None
    teacher_topk_log_probs: Tensor | None

    @property
    def student(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.student_hidden, self.student_weight, self.student_bias

    @property
    def linear_teacher(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.teacher_hidden, self.teacher_weight, self.teacher_bias


class Options(NamedTuple):
    """In the order of the schema."""

    temperature: float
    hard_weight: float
    divergence: str
    beta: float
    ignore_index: int
    reduction: str


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """What follows from the shapes, strides, dtypes and options of a call."""

    options: Options
    device: torch.device
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...] | None, ...]  # of the student's hidden, weight and bias
    loss_shape: tuple[int, ...]
    source: str  # "teacher_hidden", "teacher_logits" or "teacher_topk"
    divergence: str  # "jsd" only where beta is neither 0 nor 1
    sizes: dict[str, int]
    derived: dict[Any, Any] = field(default_factory=dict)  # by backends, under keys of their own

    @property
    def makes_gradients(self) -> bool:
        """Whether a forward can: without reduction each row's is known only in the backward."""
        return self.options.reduction != "none"


def build(*args: Any) -> Problem:
    """The problem of arguments in the registered operation's form, shapes checked."""
    inputs = Inputs(*args[: len(Inputs._fields)])
    options = args[len(Inputs._fields) :]
    checks.tensor(NAME, "student_hidden", inputs.student_hidden, 2)
    classes, features = head.check(NAME, *inputs.student, "student_", "Hs")
    lead = inputs.student_hidden.shape[:1]
    targets.check_kind(NAME, inputs.target, lead, inputs.student_hidden)
    logits, ids = inputs.teacher_logits, inputs.teacher_topk_ids
    topk = None if ids is None else (ids, inputs.teacher_topk_log_probs)
    source, teacher_features = teacher.check(inputs.linear_teacher, logits, topk, lead, classes)
    given, rows = Options(*options), lead[0]
    divergence = given.divergence
    if divergence == "jsd" and given.beta in (0, 1):
        divergence = "reverse_kl" if given.beta else "forward_kl"
    return Problem(
        options=given,
        device=inputs.student_hidden.device,
        dtype=inputs.student_hidden.dtype,
        shapes=(
            (rows, features),
            (classes, features),
            None if inputs.student_bias is None else (classes,),
        ),
        loss_shape=(rows,) if given.reduction == "none" else (),
        source=source,
        divergence=divergence,
        sizes={
            "N": rows,
            "H": features,
            "H_teacher": teacher_features,
            "V": classes,
            "k": 0 if ids is None else ids.size(-1),
            "products": rows * features * classes,
            "divergence": DIVERGENCES.index(divergence),
        },
    )


PROBLEMS: Problems[Problem] = Problems(build, inputs=len(Inputs._fields))
find = PROBLEMS.find
