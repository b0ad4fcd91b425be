"""What torch.profiler shows: `mbm_kernels::gru`, in it `mbm_kernels::gru.cpu`, with input shapes.

The first is the dispatcher's event for a registered op and autograd's for a Function, whose node is
`mbm_kernels::gru_backward`; only a call that meets neither makes its own. Without a profiler a call
pays for one attribute.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import torch_private


def active() -> bool:
    return torch_private.profiling_state._is_profiler_enabled


def event(name: str, args: Sequence[Any]) -> AbstractContextManager[Any]:
    """A span of the profile with the shapes of the tensors, and lists of tensors, in `args`."""
    return torch_private.profiler_event(name, [arg if _is_shown(arg) else None for arg in args])


def _is_shown(arg: Any) -> bool:
    if isinstance(arg, (list, tuple)):
        return len(arg) > 0 and all(isinstance(a, Tensor) for a in arg)
    return isinstance(arg, Tensor)


def rename(function: type[torch.autograd.Function], label: str) -> None:
    """Names the events of the forward and of the backward, where torch takes the classes' names."""
    function.__name__ = function.__qualname__ = label
    node = torch_private.backward_node(function)
    node.__name__ = node.__qualname__ = f"{label}_backward"
