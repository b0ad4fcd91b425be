"""Both directions of a GRU's layer in one call, for nn.GRU: the function and its registration."""

import functools
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import autocast, checks, dispatch, tracing
from mbm_kernels._core.flops import Names, Product
from mbm_kernels._core.op import Op
from mbm_kernels._core.spec import Spec
from mbm_kernels.ops.gru import onnx_form
from mbm_kernels.ops.gru.bidirectional import backend_torch, problem, reference
from mbm_kernels.ops.gru.bidirectional.by_direction import by_direction
from mbm_kernels.ops.gru.bidirectional.problem import NAME, PROBLEMS
from mbm_kernels.ops.gru.op import products as gru_products
from mbm_kernels.ops.gru.problem import check_lengths, check_shapes, fake
from mbm_kernels.ops.gru_cell.problem import WEIGHT_TYPES, WEIGHTS

REVERSE_TYPES = ", ".join(f"{weight}_reverse" for weight in WEIGHT_TYPES.split(", "))


def _products(
    x: Tensor, w_ih: Tensor, w_hh: Tensor, w_ih_reverse: Tensor, w_hh_reverse: Tensor, **_: Any
) -> list[Product]:
    def reverse(names: Names) -> Names:
        return tuple(n if n in ("x", "h0") else f"{n}_reverse" for n in names)

    return [
        *gru_products(x, w_ih, w_hh),
        *(
            Product(p.flops, tuple((flops, reverse(names)) for flops, names in p.gradients))
            for p in gru_products(x, w_ih_reverse, w_hh_reverse)
        ),
    ]


OP = Op(
    Spec(
        NAME,
        inputs=f"Tensor x, Tensor? h0, {WEIGHT_TYPES}, {REVERSE_TYPES}, Tensor? lengths",
        outputs=("y", "h_n"),
        state=("reserve",),
        saved=("y", "reserve"),
        differentiable=("x", "h0", *WEIGHTS, *(f"{name}_reverse" for name in WEIGHTS)),
        save="any",
    ),
    fake=functools.partial(fake, 2),
    reference=reference.gru_bidirectional,
    torch_fwd=backend_torch.fwd,
    opaque_torch=True,
    package=__package__,
    products=_products,
    problem=problem.find,
    onnx=onnx_form.gru_bidirectional,
)


def gru_bidirectional(
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_ih_reverse: Tensor,
    w_hh_reverse: Tensor,
    b_ih_reverse: Tensor | None,
    b_hh_reverse: Tensor | None,
    *,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`mbm_kernels.gru` forwards and in reverse, each by its own weights, features side by side.

    The backend is the one that `gru` would take, or the one set for it. cpu and cuda run both
    directions at once; any other runs them one after the other.

    Args:
        x: [T, B, C], floating; any strides.
        h0: [2, B, H], or None for zeros.
        w_ih, w_hh, b_ih, b_hh: of the first direction, as for `gru`.
        w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse: of the second.
        lengths: int64 [B], or None; as for `gru`.
        backend: "auto", "cpu", "triton", "cuda" or "torch".

    Returns:
        y [T, B, 2H], 0 past a row's length; and h_n [2, B, H].

    Raises:
        TypeError, ValueError, BackendUnavailableError: as `gru`.
    """
    weights = (w_ih, w_hh, b_ih, b_hh)
    reverse = (w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse)
    tensors: Any = (x, h0, *weights, *reverse, lengths)
    given = tuple(t for t in tensors if t is not None)
    optional = (h0, *weights[2:], *reverse[2:], lengths)
    kind = (backend, *(t is None for t in optional))
    call = PROBLEMS.call(given, kind)
    if call is not None:
        found, training = call.problem, call.differentiable and torch.is_grad_enabled()
        check_lengths(NAME, x, lengths)
    else:
        check_shapes(NAME, tensors, 2)
        check_lengths(NAME, x, lengths)
        cast = (*autocast.cast(*tensors[:-1]), lengths)
        checks.same_floating(NAME, zip(OP.diff, cast[:-1], strict=True))
        found, training = problem.find(*cast), tracing.may_need_grad(cast)
        call, tensors = PROBLEMS.remember(found, "cpu", given, kind), cast
    sizes = {**found.sizes, "training": int(training)}
    if tracing.in_onnx_export():
        return OP(backend, *tensors, sizes=sizes)  # type: ignore[no-any-return]
    chosen = dispatch.select("gru", backend, found.device, found.dtype, sizes)
    if chosen == "cuda":
        return OP("cuda", *tensors, sizes=dict(found.sizes))  # type: ignore[no-any-return]
    if chosen != "cpu":
        return by_direction(tensors, backend)
    if call is not None:
        return OP.run(call, tensors)  # type: ignore[no-any-return]
    return OP("cpu", *tensors, sizes=dict(found.sizes))  # type: ignore[no-any-return]
