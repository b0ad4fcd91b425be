"""A GRU over a sequence: the public function and its registration."""

from typing import Any

from torch import Tensor

from mbm_kernels._core import autocast, checks
from mbm_kernels._core.flops import Product, product
from mbm_kernels._core.op import Op
from mbm_kernels._core.problem import Calls, Checked
from mbm_kernels._core.spec import Spec
from mbm_kernels.ops.gru import backend_torch, reference
from mbm_kernels.ops.gru_cell.op import check_weights

NAME = "gru"


def _fake(
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    steps, batch, _ = x.shape
    hidden = w_hh.size(1)
    return (
        x.new_empty(steps, batch, hidden),
        x.new_empty(batch, hidden),
        x.new_empty((steps, batch, 4 * hidden) if save else (0,)),
    )


def products(x: Tensor, w_ih: Tensor, w_hh: Tensor, **_: Any) -> list[Product]:
    steps, batch, _features = x.shape
    state = 2 * batch * w_hh.numel()
    # The first state depends on h0 alone, those after it on everything.
    return [
        product(2 * steps * batch * w_ih.numel(), ("x",), ("w_ih",)),
        product(state * min(steps, 1), ("h0",), ("w_hh",)),
        product(state * max(steps - 1, 0), ("x", "h0", "w_ih", "w_hh", "b_ih", "b_hh"), ("w_hh",)),
    ]


OP = Op(
    Spec(
        NAME,
        inputs="Tensor x, Tensor? h0, Tensor w_ih, Tensor w_hh, Tensor? b_ih,"
        " Tensor? b_hh, Tensor? lengths",
        options="bool reverse",
        outputs=("y", "h_n"),
        state=("reserve",),
        saved=("y", "reserve"),
        differentiable=("x", "h0", "w_ih", "w_hh", "b_ih", "b_hh"),
        save="any",
    ),
    fake=_fake,
    reference=reference.gru,
    torch_fwd=backend_torch.fwd,
    opaque_torch=True,
    products=products,
)
_calls: Calls[Checked] = Calls()


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
    tensors = (x, h0, w_ih, w_hh, b_ih, b_hh)
    given = tuple(t for t in tensors if t is not None)
    kind = (reverse, backend, h0 is None, b_ih is None, b_hh is None)
    if lengths is None and (call := _calls.get(given, kind)):  # the values of lengths are checked
        return OP.run(call, (*tensors, None))  # type: ignore[no-any-return]
    checks.tensor(NAME, "x", x, 3)
    checks.tensor(NAME, "w_hh", w_hh, 2)
    steps, batch, features = x.shape
    hidden = w_hh.size(1)
    check_weights(NAME, w_ih, w_hh, b_ih, b_hh, features, hidden)
    if h0 is not None:
        checks.tensor(NAME, "h0", h0, 2)
        checks.shape(NAME, "h0", h0, "B, H", (batch, hidden))
    if lengths is not None:
        checks.lengths(NAME, "lengths", lengths, batch, steps, "T", x)
    if not isinstance(reverse, bool):
        got = f"{type(reverse).__name__} {reverse!r}"
        checks.fail(NAME, "reverse", got, "True or False", "convert it with bool(...)", TypeError)
    x, h0, w_ih, w_hh, b_ih, b_hh = autocast.cast(x, h0, w_ih, w_hh, b_ih, b_hh)  # type: ignore[assignment]
    checks.same_floating(
        NAME,
        (("x", x), ("h0", h0), ("w_ih", w_ih), ("w_hh", w_hh), ("b_ih", b_ih), ("b_hh", b_hh)),
    )
    sizes = {"T": steps, "B": batch, "C": features, "H": hidden}
    if lengths is None:
        checked = Checked((reverse,), x.device, x.dtype, dict(sizes))
        _calls.remember(checked, backend, given, kind)
    y, h_n = OP(backend, x, h0, w_ih, w_hh, b_ih, b_hh, lengths, reverse, sizes=sizes)
    return y, h_n
