"""What else is at work around a call: compilers, tracers, dispatch modes, functorch, tangents."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def in_functorch() -> bool:
    """Whether torch.func's vmap, grad, ... is at work; their tensors have no data pointer."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is not None
    )


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether a kernel may take the data pointers of these tensors.

    Not under compilation, torch.jit.trace, a dispatch mode (fake tensors, FLOP counters, selective
    checkpointing) or functorch, nor for a subclass or a meta tensor: their addresses are 0 or
    someone else's. Nor for one whose memory holds its negative (the imaginary part of a conjugate).
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    ):
        return False
    for tensor in tensors:
        if (
            (type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter)
            or tensor.is_meta
            or tensor.is_neg()
        ):
            return False
    return True


def no_kernel(tensors: Sequence[Tensor], takes_bools: bool) -> str | None:
    """Why plain torch alone can run this call, if so; `takes_bools`: an argument is a bool[]."""
    if torch.compiler.is_compiling():
        return None
    if takes_bools and torch._C._get_tracing_state() is not None:
        return "torch.jit.trace records no list of bool"
    if has_tangent(tensors):
        return "it has no forward-mode derivative"
    return None


def has_tangent(tensors: Sequence[Tensor]) -> bool:
    return forward_ad._current_level >= 0 and any(
        t.is_floating_point() and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def wants_gradient(tensor: Tensor) -> bool:
    """Whether what is computed from it now has a derivative by it, of either mode."""
    return (torch.is_grad_enabled() and tensor.requires_grad) or (
        not torch.compiler.is_compiling() and has_tangent((tensor,))
    )


def graph_is_kept() -> bool:
    """Within a backward: whether its graph will be run again."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())
