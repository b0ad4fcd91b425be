"""The k likeliest classes of a linear head: the function and its registration.

It is internal: the captioner's search calls it, and `mbm_kernels` does not export it.
"""

import math
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import autocast, checks
from mbm_kernels._core.flops import Product, product
from mbm_kernels._core.op import Op
from mbm_kernels._core.spec import Spec
from mbm_kernels.ops.linear_topk import backend_torch, reference

NAME = "linear_topk"


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    values = hidden.new_empty(hidden.size(0), k)
    return values, values.new_empty(values.shape, dtype=torch.int64)


def _products(hidden: Tensor, weight: Tensor, **_: Any) -> list[Product]:
    return [product(2 * hidden.size(0) * weight.numel(), ("hidden",), ("weight",))]


OP = Op(
    Spec(
        NAME,
        inputs="Tensor hidden, Tensor weight, Tensor? bias",
        options="int k",
        outputs=("values", "ids"),
        saved=("ids",),
        differentiable=("hidden", "weight", "bias"),
    ),
    fake=_fake,
    reference=reference.linear_topk,
    torch_fwd=backend_torch.fwd,
    products=_products,
)


def linear_topk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    k: int = 1,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The k largest log-probabilities of a projection of hidden states, and their classes.

    Equivalent to:
        logits = F.linear(hidden, weight, bias)
        ids = logits.topk(k).indices
        values = logits.log_softmax(-1).gather(-1, ids)

    Args:
        hidden: [..., H], floating.
        weight: [V, H].
        bias: [V].
        k: 1 to V. Kernels find up to 16; "auto" takes "torch" for more.
        backend: "auto", "cpu", "triton", "cuda" or "torch".

    Returns:
        values [..., k] in descending order, dtype of hidden, and ids int64 [..., k]; NaN comes
        before all else. Of equal logits "cpu" and "triton" take the lower class first, and so does
        every backend for k = 1, as torch.argmax; for more classes "torch" takes those that
        torch.topk takes, which says nothing of them.

    Raises:
        TypeError: an argument is not a tensor of the right kind, or dtypes differ outside autocast.
        ValueError: shapes, devices, k or the backend's name do not fit.
        BackendUnavailableError: a backend asked for by name cannot run.

    Numerics:
        Sums and the softmax are in float32 at least; kernels order the classes by these, before
        they are rounded. A row with NaN or +inf among its logits has NaN for all values.

    Source: the running maximum and sum of Milakov and Gimelshein, "Online normalizer calculation
    for softmax", 2018, which also fuses the k largest.
    """
    checks.tensor(NAME, "hidden", hidden)
    if hidden.dim() == 0:
        got = "a tensor without dimensions"
        checks.fail(NAME, "hidden", got, "[..., H]", "give the hidden size as last dimension")
    checks.tensor(NAME, "weight", weight, 2)
    classes, features = weight.size(0), hidden.size(-1)
    checks.shape(NAME, "weight", weight, "V, H", (classes, features))
    if bias is not None:
        checks.tensor(NAME, "bias", bias, 1)
        checks.shape(NAME, "bias", bias, "V", (classes,))
    if not isinstance(k, int) or not 1 <= k <= classes:
        checks.fail(NAME, "k", repr(k), f"1 <= k <= V = {classes}", "ask for fewer classes")
    hidden, weight, bias = autocast.cast(hidden, weight, bias)
    checks.same_floating(NAME, (("hidden", hidden), ("weight", weight), ("bias", bias)))
    lead = hidden.shape[:-1]
    rows = math.prod(lead)
    values, ids = OP(
        backend,
        hidden.reshape(rows, features),
        weight,
        bias,
        k,
        sizes={"R": rows, "H": features, "V": classes, "k": k},
    )
    return values.reshape(*lead, k), ids.reshape(*lead, k)
