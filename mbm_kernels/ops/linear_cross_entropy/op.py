"""Cross-entropy of projected hidden states: the public function and its registration."""

from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import autocast, checks, tracing
from mbm_kernels._core.flops import Product, product
from mbm_kernels._core.op import Op
from mbm_kernels._core.spec import Spec, typed
from mbm_kernels.ops.linear_cross_entropy import backend_torch, problem, reference
from mbm_kernels.ops.linear_cross_entropy.problem import NAME, PROBLEMS, Options
from mbm_kernels.ops.linear_head import head, targets


def _fake(*args: Any) -> tuple[Tensor, ...]:
    *given, save = args
    hidden, weight, _, bias, *_ = given
    p = problem.find(*given)
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    loss = hidden.new_empty(p.loss_shape, dtype=dtype)
    return loss, *targets.gradients_to_make((hidden, weight, bias), save, p.options.reduction)


def _reference(
    hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int, **rest: Any
) -> Tensor:
    hidden, target, _ = targets.unlooked(hidden, target, ignore_index, weight.size(0))
    return reference.linear_cross_entropy(hidden, weight, target, ignore_index=ignore_index, **rest)


def _products(hidden: Tensor, weight: Tensor, **_: Any) -> list[Product]:
    return [product(2 * hidden.size(0) * weight.numel(), ("hidden",), ("weight",))]


OP = Op(
    Spec(
        NAME,
        inputs="Tensor hidden, Tensor weight, Tensor target, Tensor? bias",
        options=typed(Options),
        outputs=("loss",),
        differentiable=("hidden", "weight", "bias"),
        precomputed=("hidden", "weight", "bias"),
        save="each",
    ),
    fake=_fake,
    reference=_reference,
    torch_fwd=backend_torch.fwd,
    ignored=targets.ignored_rows,
    products=_products,
    problem=problem.find,
    onnx=reference.linear_cross_entropy,  # torch 2.13's exporter drops label_smoothing
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy between a projection of hidden states and class targets.

    Equivalent to:
        logits = F.linear(hidden, weight, bias).flatten(0, -2)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        loss = F.cross_entropy(
            logits, target.flatten(), ignore_index=ignore_index,
            label_smoothing=label_smoothing, reduction=reduction,
        )
        loss = loss + z_loss * reduce(logits.logsumexp(-1) ** 2)

    Args:
        hidden: [..., H], floating.
        weight: [V, H].
        target: int64 [...], 0 <= target < V, or ignore_index.
        bias: [V].
        ignore_index: rows with this target have loss 0 and gradient 0 and do not count; nothing of
            them is read, not even a NaN.
        label_smoothing: 0 to 1; the share of the target that is spread evenly over V.
        softcap: above 0; logits become softcap * tanh(logits / softcap), before all else.
        z_loss: at least 0; adds z_loss * logsumexp(logits)^2 to each row.
        reduction: "none", "mean" over the rows that are not ignored, or "sum".
        backend: "auto", "cpu", "triton", "cuda" or "torch".

    Returns:
        A scalar, or [...] for "none"; in hidden's dtype, under autocast in float32. The mean over
        no row at all is NaN.

    Raises:
        TypeError: an argument is not a tensor of the right kind, or dtypes differ outside autocast.
        ValueError: shapes, devices, targets or options do not fit.
        BackendUnavailableError: a backend asked for by name cannot run.

    Numerics:
        Softmax and the sums over V and over rows are in float32 at least. A target that is no class
        raises in eager mode on the CPU; where its value cannot be looked at (on a GPU, under
        compilation, dispatch modes and torch.func, in tensor subclasses) its row is NaN, gradients
        too, and nothing outside is read or written.

    Source: Szegedy et al., "Rethinking the Inception architecture", 2016, section 7 (smoothing);
    Chowdhery et al., "PaLM", 2022, section 5 (z-loss); Gemma Team, "Gemma 2", 2024, section 2
    (soft-capping).
    """
    options = (ignore_index, label_smoothing, softcap, z_loss, reduction)
    given = (hidden, weight, target) if bias is None else (hidden, weight, target, bias)
    kind = (*options, backend, len(given))
    call = PROBLEMS.call(given, kind)
    if call is not None:
        targets.check_values(NAME, target, weight.size(0), ignore_index)
        rows = (head.rows_of(hidden), weight, head.flat(target), bias)
        loss: Tensor = OP.run(call, rows)
        result_dtype = hidden.dtype
    else:
        if tracing.takes_over(given):
            return tracing.deferred(linear_cross_entropy, locals())  # type: ignore[no-any-return]
        checked, explicit = _checked(given, options)
        result_dtype = head.result_dtype(hidden)
        found = problem.find(*checked, *explicit)
        loss = OP.run_first(PROBLEMS, found, (backend, given, kind), checked)
    if reduction == "none" and target.dim() != 1:
        loss = loss.reshape(target.shape)
    return loss if loss.dtype is result_dtype else loss.to(result_dtype)


def _checked(
    given: tuple[Tensor, ...], options: tuple[Any, ...]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The inputs and options of the registered operation; raises for what does not fit."""
    hidden, weight, target, bias = given if len(given) == 4 else (*given, None)
    ignore_index, label_smoothing, softcap, z_loss, reduction = options
    classes, _ = head.check(NAME, hidden, weight, bias)
    checks.choice(NAME, "reduction", reduction, targets.REDUCTIONS)
    _check_options(label_smoothing, softcap, z_loss)
    hidden, weight, bias = autocast.cast(hidden, weight, bias)
    checks.same_floating(NAME, (("hidden", hidden), ("weight", weight), ("bias", bias)))
    target = targets.check_target(NAME, target, hidden.shape[:-1], classes, ignore_index, hidden)
    checked = (head.rows_of(hidden), weight, head.flat(target), bias)
    numbers = (float(label_smoothing), None if softcap is None else float(softcap), float(z_loss))
    return checked, (ignore_index, *numbers, reduction)


def _check_options(label_smoothing: float, softcap: float | None, z_loss: float) -> None:
    checks.number(NAME, "label_smoothing", label_smoothing)
    checks.number(NAME, "z_loss", z_loss)
    if softcap is not None:
        checks.number(NAME, "softcap", softcap)
    if not 0 <= label_smoothing <= 1:
        expected = "0 <= label_smoothing <= 1"
        checks.fail(
            NAME, "label_smoothing", label_smoothing, expected, "give a share of the target"
        )
    if softcap is not None and not 0 < softcap < float("inf"):
        remedy = "give a positive number, or None for no cap"
        checks.fail(NAME, "softcap", softcap, "0 < softcap < inf", remedy)
    if not 0 <= z_loss < float("inf"):
        checks.fail(NAME, "z_loss", z_loss, "0 <= z_loss < inf", "give a weight such as 1e-4")
