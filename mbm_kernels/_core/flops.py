"""FLOPs of the operations for torch.utils.flop_counter.

What counts is what that counter knows of the stock form: the matrix products and convolutions of
the definition, 2 m k n each, and in the backward one more for each operand that needs a gradient.
As a convolution by Winograd's algorithm counts as a direct one, what a backend saves (repeated
inputs, ignored rows, steps past a row's length) or computes twice does not change the number.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

from mbm_kernels._core import torch_private
from mbm_kernels._core.arguments import any_of, as_tuple
from mbm_kernels._core.when_imported import when_imported

Names = tuple[str, ...]


@dataclass(frozen=True)
class Product:
    """A product's FLOPs, and for each product of its backward the FLOPs and the inputs of which one
    must need a gradient."""

    flops: int
    gradients: tuple[tuple[int, Names], ...]


def product(flops: int, left: Names, right: Names) -> Product:
    """Of two operands, computed from the inputs `left` and `right`; each gradient costs as much."""
    return Product(flops, ((flops, left), (flops, right)))


class Counted(Protocol):
    """What of an operation (op.Op) the formulas are made of."""

    registered: Any
    registered_backward: Any
    inputs: list[str]
    outputs: list[str]
    diff: list[str]
    bwd_names: list[str]
    products: Callable[..., list[Product]] | None


def count(op: Counted) -> None:
    """Registers the formulas of `op` once there is a FLOP counter: its module imports triton."""
    if op.products is not None:
        when_imported("torch.utils.flop_counter", lambda module: _register(module, op))


def _register(module: ModuleType, op: Counted) -> None:
    for registered, formula in (
        (op.registered, _forward(op)),
        (op.registered_backward, _backward(op)),
    ):
        module.register_flop_formula(torch_private.packet(registered), get_raw=True)(formula)


def _forward(op: Counted) -> Callable[..., int]:
    def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        named = dict(zip(op.inputs, args, strict=False)) | kwargs
        outputs = dict(zip(op.outputs, as_tuple(out_val), strict=False))
        # Gradients made by the forward count here. Their backward scales them; one that has to
        # make others, of a second output, counts as well.
        made = {
            name
            for name in op.diff
            if f"made_{name}" in outputs
            and named.get(name) is not None
            and outputs[f"made_{name}"].shape == named[name].shape
        }
        products = _products(op, named)
        return sum(p.flops for p in products) + _gradients(products, made)

    return formula


def _backward(op: Counted) -> Callable[..., int]:
    def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        named = dict(zip(op.bwd_names, args, strict=False)) | kwargs
        needs = zip(op.diff, named["needs"], strict=True)
        return _gradients(_products(op, named), {name for name, needed in needs if any_of(needed)})

    return formula


def _products(op: Counted, named: dict[str, Any]) -> list[Product]:
    assert op.products is not None
    return op.products(**{name: named[name] for name in op.inputs if name in named})


def _gradients(products: list[Product], needed: set[str]) -> int:
    return sum(flops for p in products for flops, names in p.gradients if needed & set(names))
