"""One GRU step: the public function and its registration."""

from typing import Any

from torch import Tensor

from mbm_kernels._core import autocast, checks
from mbm_kernels._core.flops import Product, product
from mbm_kernels._core.op import Op
from mbm_kernels._core.problem import Calls, Checked
from mbm_kernels._core.spec import Spec
from mbm_kernels.ops.gru_cell import backend_torch, reference

NAME = "gru_cell"


def _fake(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor]:
    reserve = (h.size(0), 4 * h.size(1)) if save else (0,)
    return h.new_empty(h.shape), h.new_empty(reserve)


def _products(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, **_: Any) -> list[Product]:
    return [
        product(2 * x.size(0) * w_ih.numel(), ("x",), ("w_ih",)),
        product(2 * h.size(0) * w_hh.numel(), ("h",), ("w_hh",)),
    ]


OP = Op(
    Spec(
        NAME,
        inputs="Tensor x, Tensor h, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh",
        outputs=("h_new",),
        state=("reserve",),
        saved=("reserve",),
        differentiable=("x", "h", "w_ih", "w_hh", "b_ih", "b_hh"),
        save="any",
    ),
    fake=_fake,
    reference=reference.gru_cell,
    torch_fwd=backend_torch.fwd,
    products=_products,
)
_calls: Calls[Checked] = Calls()


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
    given = tuple(t for t in tensors if t is not None)
    kind = (backend, b_ih is None, b_hh is None)
    if call := _calls.get(given, kind):
        return OP.run(call, tensors)  # type: ignore[no-any-return]
    checks.tensor(NAME, "x", x, 2)
    checks.tensor(NAME, "h", h, 2)
    batch, features = x.shape
    hidden = h.size(1)
    checks.shape(NAME, "h", h, "B, H", (batch, hidden))
    check_weights(NAME, w_ih, w_hh, b_ih, b_hh, features, hidden)
    x, h, w_ih, w_hh, b_ih, b_hh = autocast.cast(x, h, w_ih, w_hh, b_ih, b_hh)  # type: ignore[assignment]
    checks.same_floating(
        NAME,
        (("x", x), ("h", h), ("w_ih", w_ih), ("w_hh", w_hh), ("b_ih", b_ih), ("b_hh", b_hh)),
    )
    sizes = {"B": batch, "C": features, "H": hidden}
    _calls.remember(Checked((), x.device, x.dtype, dict(sizes)), backend, given, kind)
    h_new: Tensor = OP(backend, x, h, w_ih, w_hh, b_ih, b_hh, sizes=sizes)
    return h_new


def check_weights(
    op: str,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    features: int,
    hidden: int,
) -> None:
    """The weights and biases of a GRU whose input has `features` and whose state has `hidden`."""
    checks.tensor(op, "w_ih", w_ih, 2)
    checks.tensor(op, "w_hh", w_hh, 2)
    checks.shape(op, "w_ih", w_ih, "3H, C", (3 * hidden, features))
    checks.shape(op, "w_hh", w_hh, "3H, H", (3 * hidden, hidden))
    if b_ih is None and b_hh is None:
        return
    for name, bias in (("b_ih", b_ih), ("b_hh", b_hh)):
        if bias is None:
            checks.fail(op, name, None, "both biases, or neither", "give a tensor of zeros")
        checks.tensor(op, name, bias, 1)
        checks.shape(op, name, bias, "3H", (3 * hidden,))
