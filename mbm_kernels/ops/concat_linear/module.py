"""A linear layer over concatenated, broadcast inputs, as a module."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mbm_kernels._core import checks, dispatch, tracing
from mbm_kernels._core.drop_in import DropIn
from mbm_kernels.ops.concat_linear.op import concat_linear, linear
from mbm_kernels.ops.concat_linear.problem import NAME


class Linear(DropIn, nn.Linear):
    """torch.nn.Linear, run by concat_linear where that is predicted to be faster."""

    @tracing.leaf
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class ConcatLinear(DropIn, nn.Linear):
    """Linear over the concatenation of several inputs, without concatenating what is repeated.

    Parameters and state_dict are those of torch.nn.Linear(sum(in_features), out_features).

    Args:
        in_features: features of each input, in their order.
        out_features: features of the result.
        bias: whether there is a bias.
        backend: as for `mbm_kernels.concat_linear`.
        device, dtype: as for torch.nn.Linear.
    """

    def __init__(
        self,
        in_features: Sequence[int],
        out_features: int,
        bias: bool = True,
        *,
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ):
        if isinstance(in_features, int):
            expected = "a sequence of ints, one for each input"
            checks.fail(NAME, "in_features", in_features, expected, "wrap it in a list", TypeError)
        dispatch.check_backend("nn.ConcatLinear", backend)
        super().__init__(sum(in_features), out_features, bias, device=device, dtype=dtype)
        self.parts = tuple(in_features)
        self.backend = backend

    @tracing.leaf
    def forward(self, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        """inputs [..., C_i] in the order of `in_features` -> [..., out_features]."""
        given = tuple(x.size(-1) for x in inputs if isinstance(x, Tensor) and x.dim() > 0)
        if len(given) == len(inputs) and given != self.parts:
            expected = f"inputs with {list(self.parts)} features"
            checks.fail(NAME, "inputs", f"{list(given)}", expected, "check their order")
        return concat_linear(inputs, self.weight, self.bias, backend=self.backend)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.parts}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, backend={self.backend!r}"
        )
