"""A GRU over a sequence: the public function and its registration."""

import functools
from typing import Any

from torch import Tensor

from mbm_kernels._core import autocast, checks, tracing
from mbm_kernels._core.flops import Product, product
from mbm_kernels._core.op import Op
from mbm_kernels._core.spec import Spec
from mbm_kernels.ops.gru import backend_torch, onnx_form, problem, reference
from mbm_kernels.ops.gru.problem import NAME, PROBLEMS
from mbm_kernels.ops.gru_cell.problem import WEIGHT_TYPES, WEIGHTS


def products(x: Tensor, w_ih: Tensor, w_hh: Tensor, **_: Any) -> list[Product]:
    steps, batch, _features = x.shape
    state = 2 * batch * w_hh.numel()
    # The first state depends on h0 alone, those after it on everything.
    return [
        product(2 * steps * batch * w_ih.numel(), ("x",), ("w_ih",)),
        product(state * min(steps, 1), ("h0",), ("w_hh",)),
        product(state * max(steps - 1, 0), ("x", "h0", *WEIGHTS), ("w_hh",)),
    ]


OP = Op(
    Spec(
        NAME,
        inputs=f"Tensor x, Tensor? h0, {WEIGHT_TYPES}, Tensor? lengths",
        options="bool reverse",
        outputs=("y", "h_n"),
        state=("reserve",),
        saved=("y", "reserve"),
        differentiable=("x", "h0", *WEIGHTS),
        save="any",
    ),
    fake=functools.partial(problem.fake, 1),
    reference=reference.gru,
    torch_fwd=backend_torch.fwd,
    opaque_torch=True,
    products=products,
    problem=problem.find,
    onnx=onnx_form.gru,
)


def gru(
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One layer and direction of a gated recurrent unit over a sequence.

    Equivalent to, without lengths and forwards:
        for t in range(T):
            h0 = y[t] = torch.gru_cell(x[t], h0, w_ih, w_hh, b_ih, b_hh)
        h_n = h0

    Args:
        x: [T, B, C], floating; any strides. What it holds past a row's length is not read.
        h0: [B, H], or None for zeros.
        w_ih: [3H, C], the gates r, z, n in this order, as in torch.
        w_hh: [3H, H].
        b_ih: [3H], or None together with b_hh.
        b_hh: [3H], or None together with b_ih.
        lengths: int64 [B], 0 <= length <= T, on any device; None: every row has T steps.
        reverse: run from a row's last valid step to its first.
        backend: "auto", "cpu", "triton", "cuda" or "torch".

    Returns:
        y [T, B, H], the state after each step, 0 past a row's length; and h_n [B, H], the state
        after a row's last step in the order of running, which is h0 for a row of length 0.

    Raises:
        TypeError: an argument is not a tensor of the right kind, dtypes differ outside autocast,
            or `reverse` is no bool.
        ValueError: shapes, devices, lengths or the backend's name do not fit, or only one bias is
            given. Lengths are compared with T where their values can be looked at, on the CPU in
            eager mode; elsewhere values outside 0..T count as the nearer of the two.
        BackendUnavailableError: a backend asked for by name cannot run.

    Numerics:
        Sums are accumulated in float32 at least. The reset gate applies after the recurrent
        product, with its bias: n = tanh(W_in x + b_in + r * (W_hn h + b_hn)).

    Source: Cho et al., "Learning phrase representations using RNN encoder-decoder", 2014, in
    cuDNN's form.
    """
    tensors = (x, h0, w_ih, w_hh, b_ih, b_hh, lengths)
    given = tuple([t for t in tensors if t is not None])
    kind = (reverse, backend, h0 is None, b_ih is None, b_hh is None, lengths is None)
    if call := PROBLEMS.call(given, kind):
        if lengths is not None:
            problem.check_lengths(NAME, x, lengths)
        return OP.run(call, tensors)  # type: ignore[no-any-return]
    if tracing.takes_over(given):
        return tracing.deferred(gru, locals())  # type: ignore[no-any-return]
    problem.check_shapes(NAME, tensors, 1)
    problem.check_lengths(NAME, x, lengths)
    if not isinstance(reverse, bool):
        got = f"{type(reverse).__name__} {reverse!r}"
        checks.fail(NAME, "reverse", got, "True or False", "convert it with bool(...)", TypeError)
    cast = (*autocast.cast(*tensors[:-1]), lengths)
    checks.same_floating(NAME, zip(OP.diff, cast[:-1], strict=True))
    found = problem.find(*cast, reverse)
    return OP.run_first(PROBLEMS, found, (backend, given, kind), cast)  # type: ignore[no-any-return]
