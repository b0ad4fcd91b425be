"""What else is at work around a call: compilers, dispatch modes, functorch."""

from collections.abc import Sequence

import torch
from torch import Tensor


def in_functorch() -> bool:
    """Whether torch.func's vmap, grad, ... is at work; their tensors have no data pointer."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is not None
    )


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether a kernel may take the data pointers of these tensors.

    Not under compilation, a dispatch mode (fake tensors, FLOP counters, selective checkpointing) or
    functorch, nor for a subclass or a meta tensor: their addresses are 0 or someone else's.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return False
    for tensor in tensors:
        if (type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter) or (
            tensor.is_meta
        ):
            return False
    return True
