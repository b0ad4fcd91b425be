"""Contrastive losses of image and text: the public function and its registration."""

import math
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import autocast, checks, tracing
from mbm_kernels._core.flops import Product, product
from mbm_kernels._core.op import Op
from mbm_kernels._core.spec import Spec
from mbm_kernels.ops.contrastive_loss import backend_torch, problem, reference
from mbm_kernels.ops.contrastive_loss.problem import KINDS, NAME, PROBLEMS
from mbm_kernels.ops.linear_head import targets


def _fake(*args: Any) -> tuple[Tensor, ...]:
    *given, save = args
    image, _, scale, *_ = given
    problem.find(*given)
    return image.new_empty((), dtype=scale.dtype), *targets.gradients_to_make(
        given[:4], save, "mean"
    )


def _products(image: Tensor, text: Tensor, scale: Tensor, **_: Any) -> list[Product]:
    # In half precision the scale multiplies the product, not an operand.
    left = ("image", "scale") if image.dtype == scale.dtype else ("image",)
    return [product(2 * image.size(0) * text.numel(), left, ("text",))]


# scale and bias: 0-dimensional, float64 with float64 embeddings, else float32.
OP = Op(
    Spec(
        NAME,
        inputs="Tensor image, Tensor text, Tensor scale, Tensor? bias",
        options="str kind",
        outputs=("loss",),
        differentiable=("image", "text", "scale", "bias"),
        precomputed=("image", "text", "scale", "bias"),
        save="each",
    ),
    fake=_fake,
    reference=reference.contrastive_loss,
    torch_fwd=backend_torch.fwd,
    products=_products,
    problem=problem.find,
)


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    *,
    bias: Tensor | float | None = None,
    kind: str = "infonce",
    backend: str = "auto",
) -> Tensor:
    """Contrastive loss of B matching pairs of embeddings, softmax (CLIP) or sigmoid (SigLIP).

    Equivalent to:
        logits = scale * image @ text.T + (0 if bias is None else bias)
        pairs = torch.arange(B)
        infonce = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
        siglip = -F.logsigmoid((2 * torch.eye(B) - 1) * logits).sum() / B

    Args:
        image: [B, D], floating; used as given, so normalise it first.
        text: [B, D]; row b belongs to row b of image.
        scale: number or tensor of one element; multiplies as given, without exp.
        bias: number or tensor of one element, added to the logits; infonce does not depend on it.
        kind: "infonce", the mean of both directions, or "siglip", the sum over pairs / B.
        backend: "auto", "cpu", "triton", "cuda" or "torch".

    Returns:
        A scalar in image's dtype, under autocast in float32; differentiable with respect to image,
        text and, where they are tensors, scale and bias. NaN for B = 0.

    Raises:
        TypeError: an argument is not a tensor of the right kind, or dtypes differ outside autocast
            (scale and bias may have any floating dtype).
        ValueError: shapes, devices or the kind do not fit.
        BackendUnavailableError: a backend asked for by name cannot run.

    Numerics:
        Everything after the products of image and text is in float32 at least.

    Source: van den Oord, Li, Vinyals, "Representation learning with contrastive predictive coding",
    2018; Radford et al., "Learning transferable visual models from natural language supervision",
    2021; Zhai et al., "Sigmoid loss for language image pre-training", 2023.
    """
    given = [image, text, *(x for x in (scale, bias) if isinstance(x, Tensor))]
    how = (kind, backend, isinstance(scale, Tensor), bias is None or isinstance(bias, Tensor))
    options = (*how, bias is None)
    call = PROBLEMS.call(given, options)
    if call is None:
        if tracing.takes_over(given) or tracing.takes_over((scale, bias)):
            return tracing.deferred(contrastive_loss, locals())  # type: ignore[no-any-return]
        checks.choice(NAME, "kind", kind, KINDS)
        problem.check_shapes(image, text)
    dtype = image.dtype
    single = torch.float64 if dtype == torch.float64 else torch.float32
    scale = _scalar("scale", scale, image, single)
    bias = None if bias is None else _scalar("bias", bias, image, single)
    if call is not None:
        loss: Tensor = OP.run(call, (image, text, scale, bias))
    else:
        if autocast.enabled(image.device):
            dtype = single
        image, text = autocast.cast(image, text)
        checks.same_floating(NAME, (("image", image), ("text", text)))
        tensors = (image, text, scale, bias)
        found = problem.find(*tensors, kind)
        loss = OP.run_first(PROBLEMS, found, (backend, given, options), tensors)
    return loss if loss.dtype is dtype else loss.to(dtype)


def _scalar(name: str, value: Tensor | float, like: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` as a 0-dimensional tensor of `dtype` on the device of `like`."""
    if isinstance(value, Tensor):
        if value.dtype is dtype and value.dim() == 0 and value.device == like.device:
            return value
        if value.numel() != 1 or value.dim() > 1:
            got, expected = f"shape {list(value.shape)}", "one element, [] or [1]"
            checks.fail(NAME, name, got, expected, "reduce it first")
        checks.same_floating(NAME, ((name, value),))
        checks.same_device(NAME, name, value, "image", like)
        return value.reshape(()).to(dtype)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        got = checks.describe(value)
        checks.fail(NAME, name, got, "a number or a tensor", "convert it first", TypeError)
    if not math.isfinite(value):
        checks.fail(NAME, name, value, "a finite number", "check where it comes from")
    return torch.full((), value, dtype=dtype, device=like.device)
