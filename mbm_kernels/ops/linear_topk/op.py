"""The k likeliest classes of a linear head: the function and its registration.

It is internal: the captioner's search calls it, and `mbm_kernels` does not export it.
"""

from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import autocast, checks, tracing
from mbm_kernels._core.flops import Product, product
from mbm_kernels._core.op import Op
from mbm_kernels._core.spec import Spec
from mbm_kernels.ops.linear_head import head
from mbm_kernels.ops.linear_topk import backend_torch, problem, reference
from mbm_kernels.ops.linear_topk.problem import NAME, PROBLEMS


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    p, hidden = problem.find(*args), args[0]
    values = hidden.new_empty(p.out_shape)
    return values, values.new_empty(p.out_shape, dtype=torch.int64)


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
    problem=problem.find,
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
    given = (hidden, weight) if bias is None else (hidden, weight, bias)
    kind = (k, backend, len(given))
    call = PROBLEMS.call(given, kind)
    if call is not None:
        values, ids = OP.run(call, (head.rows_of(hidden), weight, bias))
    else:
        if tracing.takes_over(given):
            return tracing.deferred(linear_topk, locals())  # type: ignore[no-any-return]
        classes, _ = head.check(NAME, hidden, weight, bias)
        problem.check_k(k, classes)
        hidden, weight, bias = autocast.cast(hidden, weight, bias)
        checks.same_floating(NAME, (("hidden", hidden), ("weight", weight), ("bias", bias)))
        rows = (head.rows_of(hidden), weight, bias)
        found = problem.find(*rows, k)
        values, ids = OP.run_first(PROBLEMS, found, (backend, given, kind), rows)
    if hidden.dim() == 2:
        return values, ids
    lead = hidden.shape[:-1]
    return values.reshape(*lead, k), ids.reshape(*lead, k)
