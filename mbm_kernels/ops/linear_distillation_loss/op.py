"""Distillation through a linear head: the public function and its registration."""

from typing import Any, TypeGuard

import torch
from torch import Tensor

from mbm_kernels._core import autocast, checks, tracing
from mbm_kernels._core.flops import Product, product
from mbm_kernels._core.op import Op
from mbm_kernels._core.spec import Spec, typed
from mbm_kernels.ops.linear_distillation_loss import backend_torch, problem, reference, teacher
from mbm_kernels.ops.linear_distillation_loss.problem import DIVERGENCES, PROBLEMS, Inputs, Options
from mbm_kernels.ops.linear_distillation_loss.teacher import NAME
from mbm_kernels.ops.linear_head import head, targets


def _fake(*args: Any) -> tuple[Tensor, ...]:
    *given, save = args
    p, inputs = problem.find(*given), Inputs(*given[: len(Inputs._fields)])
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    results = (inputs.student_hidden.new_empty(p.loss_shape, dtype=dtype) for _ in range(3))
    return (*results, *targets.gradients_to_make(inputs.student, save, p.options.reduction))


def _reference(
    student_hidden: Tensor,
    student_weight: Tensor,
    target: Tensor,
    ignore_index: int,
    teacher_topk_ids: Tensor | None,
    teacher_topk_log_probs: Tensor | None,
    **rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    student_hidden, target, ids = targets.unlooked(
        student_hidden, target, ignore_index, student_weight.size(0), teacher_topk_ids
    )
    topk = None
    if ids is not None:
        assert teacher_topk_log_probs is not None
        topk = (ids, teacher_topk_log_probs)
    return reference.linear_distillation_loss(
        *(student_hidden, student_weight, target),
        teacher_topk=topk,
        ignore_index=ignore_index,
        **rest,
    )


def _products(
    student_hidden: Tensor, student_weight: Tensor, teacher_weight: Tensor | None, **_: Any
) -> list[Product]:
    rows = 2 * student_hidden.size(0)
    heads = [product(rows * student_weight.numel(), ("student_hidden",), ("student_weight",))]
    if teacher_weight is not None:
        heads.append(product(rows * teacher_weight.numel(), (), ()))
    return heads


OP = Op(
    Spec(
        NAME,
        inputs=typed(Inputs),
        options=typed(Options),
        outputs=("loss", "hard", "soft"),
        differentiable=("student_hidden", "student_weight", "student_bias"),
        precomputed=("student_hidden", "student_weight", "student_bias"),
        save="each",
    ),
    fake=_fake,
    reference=_reference,
    torch_fwd=backend_torch.fwd,
    ignored=targets.ignored_rows,
    products=_products,
    problem=problem.find,
)


def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    target: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    teacher_topk: tuple[Tensor, Tensor] | None = None,
    temperature: float = 1.0,
    hard_weight: float = 0.5,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of a student's linear head, and its divergence from a teacher's.

    Equivalent to (forward_kl, reduction "none", no row ignored, T = temperature):
        student = F.linear(student_hidden, student_weight, student_bias)
        teacher = F.linear(teacher_hidden, teacher_weight, teacher_bias).detach()
        hard = F.cross_entropy(student, target, reduction="none")
        soft = T**2 * F.kl_div(
            (student / T).log_softmax(-1), (teacher / T).log_softmax(-1),
            log_target=True, reduction="none",
        ).sum(-1)
        loss = hard_weight * hard + (1 - hard_weight) * soft

    Exactly one source of the teacher is given: hidden and weight, logits, or topk. With topk both
    distributions have k + 1 bins, the ids given and all others together (k bins where k = V);
    tempering raises the bins' probabilities to 1 / T and normalises, for teacher and student alike.

    Args:
        student_hidden: [..., Hs], floating.
        student_weight: [V, Hs].
        target: int64 [...], 0 <= target < V, or ignore_index.
        student_bias: [V].
        teacher_hidden: [..., Ht]; Ht need not be Hs.
        teacher_weight: [V, Ht].
        teacher_bias: [V].
        teacher_logits: [..., V].
        teacher_topk: ids int64 [..., k], different from one another in each row (not checked), and
            log-probabilities [..., k] at temperature 1.
        temperature: above 0.
        hard_weight: 0 to 1; a term whose weight is 0 is left out of the loss.
        divergence: "forward_kl" is KL(teacher || student), "reverse_kl" is KL(student || teacher),
            "jsd" is beta KL(teacher || m) + (1 - beta) KL(student || m) with the mixture
            m = beta teacher + (1 - beta) student.
        beta: 0 to 1, for "jsd"; 0 means forward_kl and 1 reverse_kl.
        ignore_index: rows with this target have losses 0 and gradients 0 and do not count; nothing
            of them is read, not of the teacher either.
        reduction: "none", "mean" over the rows that are not ignored, or "sum"; for all three.
        backend: "auto", "cpu", "triton", "cuda" or "torch".

    Returns:
        (loss, hard, soft): scalars, or [...] for "none"; in student_hidden's dtype, under autocast
        in float32. All three are differentiable with respect to the student; the teacher gets no
        gradient. The mean over no row at all is NaN.

    Raises:
        TypeError: an argument is not a tensor of the right kind, or dtypes differ outside autocast.
        ValueError: shapes, devices, targets, ids or options do not fit, or there is not exactly one
            teacher.
        BackendUnavailableError: a backend asked for by name cannot run.

    Numerics:
        Softmax and sums are in float32 at least. A probability of 0 adds 0, whatever the other
        distribution has there; minus infinity in a bias or in the teacher's logits counts as -1e30.
        A tail below 2^-23 counts as 2^-23. A target or id that is no class raises in eager mode on
        the CPU; where its value cannot be looked at (on a GPU, under compilation, dispatch modes
        and torch.func, in tensor subclasses) its row is NaN in all results and gradients, and
        nothing outside is read or written.

    Source: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015; Agarwal et
    al., "On-policy distillation of language models", 2024 (generalised JSD).
    """
    options = Options(temperature, hard_weight, divergence, beta, ignore_index, reduction)
    topk = teacher_topk if _is_pair(teacher_topk) else (teacher_topk, None)
    linear_teacher = (teacher_hidden, teacher_weight, teacher_bias)
    constants = (_constant(x) for x in (*linear_teacher, teacher_logits, *topk))
    inputs = Inputs(student_hidden, student_weight, target, student_bias, *constants)
    given = [x for x in inputs if x is not None]
    kind = (*options, backend, *[x is None for x in inputs])
    call = PROBLEMS.call(given, kind)
    if call is not None:
        _check_values(inputs, ignore_index)
        results = OP.run(call, _flat(inputs))
        result_dtype = student_hidden.dtype
    else:
        if tracing.takes_over(given) or tracing.takes_over((teacher_topk,)):
            return tracing.deferred(linear_distillation_loss, locals())  # type: ignore[no-any-return]
        check_options(temperature, hard_weight, divergence, beta, reduction)
        checked = _flat(_checked(inputs, teacher_topk, ignore_index))
        result_dtype = head.result_dtype(student_hidden)
        numbers = (float(temperature), float(hard_weight), divergence, float(beta))
        explicit = (*numbers, ignore_index, reduction)
        found = problem.find(*checked, *explicit)
        results = OP.run_first(PROBLEMS, found, (backend, given, kind), checked)
    if reduction == "none" and target.dim() != 1:
        results = tuple(x.reshape(target.shape) for x in results)
    loss, hard, soft = (x if x.dtype is result_dtype else x.to(result_dtype) for x in results)
    return loss, hard, soft


def _is_pair(topk: object) -> TypeGuard[tuple[Any, Any]]:
    return isinstance(topk, (tuple, list)) and len(topk) == 2


def _constant(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) and x.requires_grad else x


def _flat(inputs: Inputs) -> Inputs:
    """Rows as the registered operation takes them."""
    if inputs.student_hidden.dim() == 2:  # and so have all the others: they are checked
        return inputs
    rows = {
        name: head.rows_of(getattr(inputs, name))
        for name in (
            "teacher_hidden",
            "teacher_logits",
            "teacher_topk_ids",
            "teacher_topk_log_probs",
        )
        if getattr(inputs, name) is not None
    }
    hidden, target = head.rows_of(inputs.student_hidden), head.flat(inputs.target)
    return inputs._replace(student_hidden=hidden, target=target, **rows)


def _checked(inputs: Inputs, topk: Any, ignore_index: int) -> Inputs:
    """As autocast wants them, the teacher detached; raises for what does not fit."""
    classes, _ = head.check(NAME, *inputs.student, "student_", "Hs")
    hidden, lead = inputs.student_hidden, inputs.student_hidden.shape[:-1]
    linear, logits, log_probs = (
        inputs.linear_teacher,
        inputs.teacher_logits,
        inputs.teacher_topk_log_probs,
    )
    source, _ = teacher.check(linear, logits, topk, lead, classes)
    ids = inputs.teacher_topk_ids
    if ids is not None:
        checks.same_device(NAME, "teacher_topk", ids, "student_hidden", hidden)
    in_autocast = autocast.enabled(hidden.device)
    hidden, weight, bias = autocast.cast(*inputs.student)
    if source == "teacher_hidden":
        linear = autocast.cast(*linear)
    named = [("student_hidden", hidden), ("student_weight", weight), ("student_bias", bias)]
    named += zip(("teacher_hidden", "teacher_weight", "teacher_bias"), linear, strict=True)
    given = [("teacher_logits", logits), ("teacher_topk's log-probabilities", log_probs)]
    if in_autocast:  # they are not multiplied, so keep the precision that they have
        for name, value in given:
            if value is not None:
                checks.same_floating(NAME, ((name, value),))
                checks.same_device(NAME, name, value, "student_hidden", hidden)
    else:
        named += given
    checks.same_floating(NAME, named)
    target = targets.check_target(NAME, inputs.target, lead, classes, ignore_index, hidden)
    constants = (None if x is None else x.detach() for x in (*linear, logits, ids, log_probs))
    checked = Inputs(hidden, weight, target, bias, *constants)
    _check_topk_values(checked, ignore_index)
    return checked


def _check_values(inputs: Inputs, ignore_index: int) -> None:
    classes = inputs.student_weight.size(0)
    targets.check_values(NAME, inputs.target, classes, ignore_index)
    _check_topk_values(inputs, ignore_index)


def _check_topk_values(inputs: Inputs, ignore_index: int) -> None:
    ids, log_probs = inputs.teacher_topk_ids, inputs.teacher_topk_log_probs
    if ids is not None and log_probs is not None:
        keep, classes = inputs.target != ignore_index, inputs.student_weight.size(0)
        teacher.check_topk_values(ids, log_probs, keep, classes)


def check_options(
    temperature: float, hard_weight: float, divergence: str, beta: float, reduction: str
) -> None:
    for name, value in (("temperature", temperature), ("hard_weight", hard_weight), ("beta", beta)):
        checks.number(NAME, name, value)
    if not 0 < temperature < float("inf"):
        remedy = "give a positive number; 1 leaves the distributions as they are"
        checks.fail(NAME, "temperature", temperature, "0 < temperature < inf", remedy)
    if not 0 <= hard_weight <= 1:
        remedy = "give the share of the cross-entropy"
        checks.fail(NAME, "hard_weight", hard_weight, "0 <= hard_weight <= 1", remedy)
    checks.choice(NAME, "divergence", divergence, DIVERGENCES)
    if not 0 <= beta <= 1:
        remedy = "0 is forward_kl, 1 is reverse_kl"
        checks.fail(NAME, "beta", beta, "0 <= beta <= 1", remedy)
    checks.choice(NAME, "reduction", reduction, targets.REDUCTIONS)
