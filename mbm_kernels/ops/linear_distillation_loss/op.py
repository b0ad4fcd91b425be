"""Distillation through a linear head: the public function and its registration."""

from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import autocast, checks
from mbm_kernels._core.flops import Product, product
from mbm_kernels._core.op import Op
from mbm_kernels._core.spec import Spec
from mbm_kernels.ops.linear_distillation_loss import backend_torch, reference
from mbm_kernels.ops.linear_head import targets

NAME = "linear_distillation_loss"
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
# Rounding in bfloat16 moves the sum of a teacher's probabilities by less than this.
MASS_SLACK = 0.05


def _fake(student_hidden: Tensor, student_weight: Tensor, target: Tensor, *rest: Any) -> Any:
    dtype = torch.float64 if student_hidden.dtype == torch.float64 else torch.float32
    student_bias, reduction, save = rest[0], rest[-2], rest[-1]
    shape = target.shape if reduction == "none" else ()
    results = (student_hidden.new_empty(shape, dtype=dtype) for _ in range(3))
    student = (student_hidden, student_weight, student_bias)
    return (*results, *targets.gradients_to_make(student, save, reduction))


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
        inputs="Tensor student_hidden, Tensor student_weight, Tensor target,"
        " Tensor? student_bias, Tensor? teacher_hidden, Tensor?"
        " teacher_weight, Tensor? teacher_bias, Tensor? teacher_logits,"
        " Tensor? teacher_topk_ids, Tensor? teacher_topk_log_probs",
        options="float temperature, float hard_weight, str divergence, float beta,"
        " int ignore_index, str reduction",
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
    check_options(temperature, hard_weight, divergence, beta, reduction)
    checks.tensor(NAME, "student_hidden", student_hidden)
    if student_hidden.dim() == 0:
        got, remedy = "a tensor without dimensions", "give the hidden size as last dimension"
        checks.fail(NAME, "student_hidden", got, "[..., Hs]", remedy)
    checks.tensor(NAME, "student_weight", student_weight, 2)
    lead = student_hidden.shape[:-1]
    classes, features = student_weight.size(0), student_hidden.size(-1)
    checks.shape(NAME, "student_weight", student_weight, "V, Hs", (classes, features))
    if student_bias is not None:
        checks.tensor(NAME, "student_bias", student_bias, 1)
        checks.shape(NAME, "student_bias", student_bias, "V", (classes,))
    source = _check_source(
        teacher_hidden, teacher_weight, teacher_bias, teacher_logits, teacher_topk
    )
    ids: Tensor | None = None
    log_probs: Tensor | None = None
    teacher_features = 0
    if source == "teacher_topk":
        ids, log_probs = _check_topk(teacher_topk, lead, classes)
        checks.same_device(NAME, "teacher_topk", ids, "student_hidden", student_hidden)
    elif source == "teacher_logits":
        checks.tensor(NAME, "teacher_logits", teacher_logits)
        assert teacher_logits is not None
        _check_rows("teacher_logits", teacher_logits, "..., V", lead, classes)
    else:
        teacher_features = _check_linear(
            teacher_hidden, teacher_weight, teacher_bias, lead, classes
        )

    in_autocast = autocast.enabled(student_hidden.device)
    result_dtype = student_hidden.dtype
    if in_autocast and result_dtype != torch.float64:
        result_dtype = torch.float32
    student_hidden, student_weight, student_bias = autocast.cast(
        student_hidden, student_weight, student_bias
    )
    if source == "teacher_hidden":
        teacher_hidden, teacher_weight, teacher_bias = autocast.cast(
            teacher_hidden, teacher_weight, teacher_bias
        )
    named = [
        ("student_hidden", student_hidden),
        ("student_weight", student_weight),
        ("student_bias", student_bias),
        ("teacher_hidden", teacher_hidden),
        ("teacher_weight", teacher_weight),
        ("teacher_bias", teacher_bias),
    ]
    given = [("teacher_logits", teacher_logits), ("teacher_topk's log-probabilities", log_probs)]
    if in_autocast:  # they are not multiplied, so keep the precision that they have
        for name, value in given:
            if value is not None:
                checks.same_floating(NAME, ((name, value),))
                checks.same_device(NAME, name, value, "student_hidden", student_hidden)
    else:
        named += given
    checks.same_floating(NAME, named)
    target = targets.check_target(NAME, target, lead, classes, ignore_index, student_hidden)
    if ids is not None and log_probs is not None:
        _check_topk_values(ids, log_probs, target != ignore_index, classes)

    rows = target.numel()

    def flat(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().reshape(rows, x.size(-1))

    results = OP(
        backend,
        student_hidden.reshape(rows, features),
        student_weight,
        target.reshape(rows),
        student_bias,
        flat(teacher_hidden),
        None if teacher_weight is None else teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
        flat(teacher_logits),
        flat(ids),
        flat(log_probs),
        float(temperature),
        float(hard_weight),
        divergence,
        float(beta),
        ignore_index,
        reduction,
        sizes={
            "N": rows,
            "H": features,
            "H_teacher": teacher_features,
            "V": classes,
            "k": 0 if ids is None else ids.size(-1),
            "products": rows * features * classes,
        },
    )
    if reduction == "none":
        results = tuple(x.reshape(lead) for x in results)
    loss, hard, soft = (x.to(result_dtype) for x in results)
    return loss, hard, soft


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


def _check_topk(topk: Any, lead: torch.Size, classes: int) -> tuple[Tensor, Tensor]:
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
    return ids, log_probs


def _check_topk_values(ids: Tensor, log_probs: Tensor, keep: Tensor, classes: int) -> None:
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
