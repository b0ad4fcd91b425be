"""What else is at work around a call: compilers, tracers, dispatch modes, functorch, tangents."""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.fx
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from mbm_kernels._core import arguments, torch_private
from mbm_kernels._core.torch_private import tangents


def in_functorch() -> bool:
    """Whether torch.func's vmap, grad, ... is at work; their tensors have no data pointer."""
    return not torch.compiler.is_compiling() and torch_private.functorch_level() is not None


_modes = torch_private.dispatch_modes
_functorch_level = torch_private.functorch_level
_jit_state = torch_private.jit_state
_autocast = torch_private.autocast_enabled


def is_eager() -> bool:
    """Whether nothing is at work around a call that its tensors and options do not tell of.

    No compiler, tracer, dispatch mode, functorch, autocast or forward-mode derivative.
    """
    return not (
        torch.compiler.is_compiling()
        or _modes() > 0
        or _functorch_level() is not None
        or _jit_state() is not None
        or _autocast()
        or tangents._current_level >= 0
    )


def in_onnx_export() -> bool:
    """Whether torch.onnx.export is tracing."""
    return torch.compiler.is_compiling() and _in_onnx_export()


def _in_onnx_export() -> bool:
    module = sys.modules.get("torch.onnx")  # importing it takes 0.3 s
    return module is not None and module.is_in_onnx_export()


torch_private.constant(_in_onnx_export)


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether a kernel may take the data pointers of these tensors.

    Not under compilation, torch.jit.trace, a dispatch mode (fake tensors, FLOP counters, selective
    checkpointing) or functorch, nor for a subclass or a meta tensor: their addresses are 0 or
    someone else's. Nor for one whose memory holds its negative (the imaginary part of a conjugate).
    """
    if (
        torch.compiler.is_compiling()
        or _modes() > 0
        or _functorch_level() is not None
        or _jit_state() is not None
    ):
        return False
    for tensor in tensors:
        kind = type(tensor)
        if (kind is not Tensor and kind is not Parameter) or tensor.is_meta or tensor.is_neg():
            return False
    return True


F = TypeVar("F", bound=Callable[..., Any])


def leaf(forward: F) -> F:
    """A module's forward, which torch.fx.symbolic_trace records as one node, as of torch.nn's own.

    torch.fx.Tracer knows leaves by the package that their class is from, and calls the forward of
    all others with symbols.
    """

    @functools.wraps(forward)
    def call(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        for arg in (*args, *kwargs.values()) if kwargs else args:
            if type(arg) is not Tensor and isinstance(arg, torch.fx.Proxy):
                tracer: Any = arg.tracer
                path = tracer.path_of_module(self)
                return tracer.create_proxy("call_module", path, args, kwargs)
        return forward(self, *args, **kwargs)

    return call  # type: ignore[return-value]


def takes_over(given: Sequence[Any]) -> bool:
    """Whether one of the arguments is no tensor but stands for one, as torch.fx's symbols do."""
    for arg in given:
        if isinstance(arg, (list, tuple)):
            if takes_over(arg):
                return True
        elif not isinstance(arg, Tensor) and hasattr(type(arg), "__torch_function__"):
            return True
    return False


def deferred(function: Callable[..., Any], local: Mapping[str, Any]) -> Any:
    """What the `__torch_function__` of an argument makes of a call; torch.fx records one node.

    `local` are the local variables of `function`, its arguments among them.
    """
    args, named = [], {}
    for parameter in inspect.signature(function).parameters.values():
        value = local[parameter.name]
        if parameter.kind is parameter.KEYWORD_ONLY:
            if value is not parameter.default:
                named[parameter.name] = value
        else:
            args.append(value)
    relevant = [a for a in arguments.flat((*args, *named.values())) if takes_over((a,))]
    return torch.overrides.handle_torch_function(function, relevant, *args, **named)


def may_need_grad(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a backward through these tensors may follow.

    What torch.jit.trace records is constant: the graph trains and infers alike, and torch compares
    it with a second one that is traced without gradients.
    """
    if not torch.compiler.is_compiling() and torch_private.jit_state() is not None:
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def concrete(sizes: dict[str, int]) -> dict[str, int]:
    """`sizes` to choose a backend by, where something traces: a symbol counts as its example.

    Any backend is right for any size, so no guard may come of the choice: it would compile again at
    each boundary of a table, and make torch.export refuse a range that holds one.
    """
    if not torch.compiler.is_compiling() and torch_private.jit_state() is not None:
        return {name: int(size) for name, size in sizes.items()}
    from torch.fx.experimental import symbolic_shapes  # imports sympy

    if not hasattr(symbolic_shapes, "optimization_hint"):  # before torch 2.13
        return sizes
    return {
        name: symbolic_shapes.optimization_hint(size, fallback=0) for name, size in sizes.items()
    }


def no_kernel(tensors: Sequence[Tensor], takes_bools: bool) -> str | None:
    """Why plain torch alone can run this call, if so; `takes_bools`: an argument is a bool[]."""
    if torch.compiler.is_compiling():
        return None
    if takes_bools and torch_private.jit_state() is not None:
        return "torch.jit.trace records no list of bool"
    if has_tangent(tensors):
        return "it has no forward-mode derivative"
    return None


def has_tangent(tensors: Sequence[Tensor]) -> bool:
    return tangents._current_level >= 0 and any(
        t.is_floating_point() and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def wants_gradient(tensor: Tensor) -> bool:
    """Whether what is computed from it now has a derivative by it, of either mode."""
    return (torch.is_grad_enabled() and tensor.requires_grad) or (
        not torch.compiler.is_compiling() and has_tangent((tensor,))
    )


def graph_is_kept() -> bool:
    """Within a backward: whether its graph will be run again."""
    return bool(torch_private.graph_is_kept())
