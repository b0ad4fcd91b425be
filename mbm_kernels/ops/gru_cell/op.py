"""One GRU step: the public function and its registration."""

from typing import Any

from torch import Tensor

from mbm_kernels._core import autocast, checks, tracing
from mbm_kernels._core.flops import Product, product
from mbm_kernels._core.op import Op
from mbm_kernels._core.spec import Spec
from mbm_kernels.ops.gru_cell import backend_torch, problem, reference
from mbm_kernels.ops.gru_cell.problem import NAME, PROBLEMS, WEIGHT_TYPES, WEIGHTS


def _fake(x: Tensor, h: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    reserve = (h.size(0), 4 * h.size(1)) if rest[-1] else (0,)
    return h.new_empty(h.shape), h.new_empty(reserve)


def _products(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, **_: Any) -> list[Product]:
    return [
        product(2 * x.size(0) * w_ih.numel(), ("x",), ("w_ih",)),
        product(2 * h.size(0) * w_hh.numel(), ("h",), ("w_hh",)),
    ]


OP = Op(
    Spec(
        NAME,
        inputs=f"Tensor x, Tensor h, {WEIGHT_TYPES}",
        outputs=("h_new",),
        state=("reserve",),
        saved=("reserve",),
        differentiable=("x", "h", *WEIGHTS),
        save="any",
    ),
    fake=_fake,
    reference=reference.gru_cell,
    torch_fwd=backend_torch.fwd,
    products=_products,
    problem=problem.find,
)


def gru_cell(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """One step of a gated recurrent unit.

    Equivalent to:
        torch.gru_cell(x, h, w_ih, w_hh, b_ih, b_hh)

    Args:
        x: [B, C], floating.
        h: [B, H], the state before the step.
        w_ih: [3H, C], the gates r, z, n in this order, as in torch.
        w_hh: [3H, H].
        b_ih: [3H], or None together with b_hh.
        b_hh: [3H], or None together with b_ih.
        backend: "auto", "cpu", "triton", "cuda" or "torch".

    Returns:
        h' [B, H], the state after the step.

    Raises:
        TypeError: an argument is not a tensor of the right kind, or dtypes differ outside autocast.
        ValueError: shapes, devices or the backend's name do not fit, or only one bias is given.
        BackendUnavailableError: a backend asked for by name cannot run.

    Numerics:
        Sums are accumulated in float32 at least. The reset gate applies after the recurrent
        product, with its bias: n = tanh(W_in x + b_in + r * (W_hn h + b_hn)).

    Source: Cho et al., "Learning phrase representations using RNN encoder-decoder", 2014, in
    cuDNN's form.
    """
    tensors = (x, h, w_ih, w_hh, b_ih, b_hh)
    given = tuple([t for t in tensors if t is not None])
    kind = (backend, b_ih is None, b_hh is None)
    if call := PROBLEMS.call(given, kind):
        return OP.run(call, tensors)  # type: ignore[no-any-return]
    if tracing.takes_over(given):
        return tracing.deferred(gru_cell, locals())  # type: ignore[no-any-return]
    problem.check(tensors)
    cast = autocast.cast(*tensors)
    checks.same_floating(NAME, zip(OP.diff, cast, strict=True))
    found = problem.find(*cast)
    return OP.run_first(PROBLEMS, found, (backend, given, kind), cast)  # type: ignore[no-any-return]
