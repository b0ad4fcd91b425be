"""Both directions of a GRU's layer in one call, for nn.GRU: the function and its registration."""

from typing import Any

from torch import Tensor

from mbm_kernels._core import autocast, checks, dispatch, tracing
from mbm_kernels._core.flops import Names, Product
from mbm_kernels._core.op import Op
from mbm_kernels._core.spec import Spec
from mbm_kernels.ops.gru.bidirectional import backend_torch, reference
from mbm_kernels.ops.gru.bidirectional.by_direction import by_direction
from mbm_kernels.ops.gru.op import products as gru_products
from mbm_kernels.ops.gru_cell.op import check_weights

NAME = "gru_bidirectional"


def _fake(
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
    lengths: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    steps, batch, _ = x.shape
    hidden = w_hh.size(1)
    return (
        x.new_empty(steps, batch, 2 * hidden),
        x.new_empty(2, batch, hidden),
        x.new_empty((2, steps, batch, 4 * hidden) if save else (0,)),
    )


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
        inputs="Tensor x, Tensor? h0, Tensor w_ih, Tensor w_hh, Tensor? b_ih,"
        " Tensor? b_hh, Tensor w_ih_reverse, Tensor w_hh_reverse, Tensor?"
        " b_ih_reverse, Tensor? b_hh_reverse, Tensor? lengths",
        outputs=("y", "h_n"),
        state=("reserve",),
        saved=("y", "reserve"),
        differentiable=(
            "x",
            "h0",
            "w_ih",
            "w_hh",
            "b_ih",
            "b_hh",
            "w_ih_reverse",
            "w_hh_reverse",
            "b_ih_reverse",
            "b_hh_reverse",
        ),
        save="any",
    ),
    fake=_fake,
    reference=reference.gru_bidirectional,
    torch_fwd=backend_torch.fwd,
    opaque_torch=True,
    package=__package__,
    products=_products,
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

    The backend is the one that `gru` would take, or the one set for it. cpu runs both directions
    at once; any other runs them one after the other.

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
    checks.tensor(NAME, "x", x, 3)
    checks.tensor(NAME, "w_hh", w_hh, 2)
    steps, batch, features = x.shape
    hidden = w_hh.size(1)
    weights = w_ih, w_hh, b_ih, b_hh
    others = w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse
    check_weights(NAME, *weights, features, hidden)
    check_weights(NAME, *others, features, hidden)
    if h0 is not None:
        checks.tensor(NAME, "h0", h0, 3)
        checks.shape(NAME, "h0", h0, "2, B, H", (2, batch, hidden))
    if lengths is not None:
        checks.lengths(NAME, "lengths", lengths, batch, steps, "T", x)
    given = autocast.cast(x, h0, *weights, *others)
    named = tuple(zip(OP.diff, given, strict=True))
    checks.same_floating(NAME, named)
    needs_grad = tracing.may_need_grad([t for t in given if t is not None])
    sizes = {"T": steps, "B": batch, "C": features, "H": hidden}
    judged = {**sizes, "training": int(needs_grad)}
    if dispatch.select("gru", backend, x.device, given[0].dtype, judged) == "cpu":
        y, h_n = OP("cpu", *given, lengths, sizes=sizes)
        return y, h_n
    return by_direction(x, h0, weights, others, lengths, backend)
