"""The roles of an operation's arguments and results, from which its two schemas follow."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, get_type_hints

from torch import Tensor


@dataclass(frozen=True)
class Spec:
    """What an operation takes, returns and saves.

    The forward's schema is `(inputs, options, save) -> (outputs, state, made_<precomputed>)`, the
    backward's `(grad_<outputs>, inputs, saved, options, needs) -> one gradient for each needed`.

    Args:
        name: as in `mbm_kernels.ops.<name>`.
        inputs: the tensors with their types, as in "Tensor x, Tensor? mask".
        options: everything else with its types, as in "int groups, str? activation".
        outputs: what the public function returns; each may have a gradient.
        state: further tensors that the forward returns and no user sees.
        saved: those of `outputs` and `state` that the backward reads.
        differentiable: the inputs that have gradients.
        precomputed: those of `differentiable` whose gradient the forward computes too, for a
            gradient of 1 of the first output, a scalar: float32, empty where it was not wanted.
        save: whether the forward is told that a backward may come ("any": one bool), or which of
            `differentiable` will want a gradient ("each": a bool for each), or nothing (None).
    """

    name: str
    inputs: str
    outputs: tuple[str, ...]
    differentiable: tuple[str, ...]
    options: str = ""
    state: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    precomputed: tuple[str, ...] = ()
    save: Literal["any", "each"] | None = None

    def __post_init__(self) -> None:
        known = {
            "differentiable": self.input_names,
            "precomputed": self.differentiable,
            "saved": (*self.outputs, *self.state),
        }
        for role, names in known.items():
            if strangers := set(getattr(self, role)) - set(names):
                raise ValueError(
                    f"{self.name}: {role}: got {sorted(strangers)}; expected names among "
                    f"{list(names)}; fix the spec"
                )

    @cached_property
    def input_names(self) -> tuple[str, ...]:
        return _names(self.inputs)

    @cached_property
    def option_names(self) -> tuple[str, ...]:
        return _names(self.options)

    @cached_property
    def forward_names(self) -> tuple[str, ...]:
        save = () if self.save is None else ("save",)
        return (*self.input_names, *self.option_names, *save)

    @cached_property
    def made_names(self) -> tuple[str, ...]:
        return tuple(f"made_{name}" for name in self.precomputed)

    @cached_property
    def results(self) -> tuple[str, ...]:
        """All that the forward returns."""
        return (*self.outputs, *self.state, *self.made_names)

    @cached_property
    def grad_names(self) -> tuple[str, ...]:
        return tuple(f"grad_{name}" for name in self.outputs)

    @cached_property
    def backward_names(self) -> tuple[str, ...]:
        tensors = (*self.grad_names, *self.input_names, *self.saved)
        return (*tensors, *self.option_names, "needs")

    @cached_property
    def forward_schema(self) -> str:
        """The schema of the forward, without the backend, its last argument."""
        save = {"any": "bool save", "each": "bool[] save", None: ""}[self.save]
        returned = ", ".join(f"Tensor {name}" for name in self.results)
        return f"({_joined(self.inputs, self.options, save)}) -> ({returned})"

    @cached_property
    def backward_schema(self) -> str:
        """The schema of the backward, without the backend and the returned gradients."""
        grads = ", ".join(f"Tensor? {name}" for name in self.grad_names)
        saved = ", ".join(f"Tensor {name}" for name in self.saved)
        return f"({_joined(grads, self.inputs, saved, self.options, 'bool[] needs')})"

    def save_arguments(self, wanted: bool) -> tuple[Any, ...]:
        """What follows the forward's options: `save` for all or nothing, if there is one."""
        each = (wanted,) * len(self.differentiable)
        return {"any": (wanted,), "each": (each,), None: ()}[self.save]

    @cached_property
    def has_lists(self) -> bool:
        return "Tensor[]" in self.inputs


_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "int",
    float: "float",
    float | None: "float?",
    str: "str",
}


def typed(fields: type) -> str:
    """The names and types of a NamedTuple's fields, as `Spec` takes inputs and options."""
    return ", ".join(f"{_TYPES[kind]} {name}" for name, kind in get_type_hints(fields).items())


def _joined(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def _names(typed: str) -> tuple[str, ...]:
    return tuple(part.split()[-1] for part in typed.split(",") if part)


class Operation(Protocol):
    """What of an operation (op.Op) its autograd functions and its registration are made of."""

    spec: Spec
    label: str
    fake: Callable[..., Any]
    reference: Callable[..., Any]
    ignored: Callable[[dict[str, Any]], Tensor] | None
    registration: Any
    registered: Any
    registered_backward: Any

    def backend_fwd(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]: ...
    def backend_bwd(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]: ...
    def problem_fwd(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]: ...
    def problem_bwd(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]: ...
    def present(self, *args: Any, **kwargs: Any) -> list[Tensor]: ...
    def torch_fwd_explicit(self, *args: Any, **kwargs: Any) -> Any: ...
