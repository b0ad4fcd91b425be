"""The private names of torch that this package uses, and what stands in for each where it is gone.

tests/core/test_torch_private.py finds such names in the package and holds them to this module, and
runs every operation with the stand-ins. What a stand-in cannot know, it takes for the case in which
results stay right: a dispatch mode at work, a hook that is set.
"""

import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, profiler

# State of torch.nn's classes, which copies, checkpoints and tools of torch rely upon; a subclass of
# them has no other way to it, and there are no stand-ins.
INHERITED = (
    "_backward_hooks",  # nn.Module
    "_backward_pre_hooks",
    "_buffers",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_modules",
    "_parameters",
    "_all_weights",  # nn.RNNBase
    "_flat_weight_refs",
    "_init_flat_weights",
    "_update_flat_weights",
    "_qkv_same_embed_dim",  # nn.MultiheadAttention
    "_reversed_padding_repeated_twice",  # nn.Conv2d
)


def _found(path: str, otherwise: Any) -> Any:
    """What `path` names in torch, else `otherwise`."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return otherwise if found is None else found


def _tracing() -> bool | None:
    return True if torch.jit.is_tracing() else None  # type: ignore[attr-defined]


def _autocast() -> bool:
    return any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


def _recorded(name: str, args: Sequence[Any]) -> AbstractContextManager[Any]:
    return profiler.record_function(name)


# Called in most calls, so that there is no function around them.
jit_state: Callable[[], Any] = _found("_C._get_tracing_state", _tracing)
autocast_enabled: Callable[[], bool] = _found("_C._is_any_autocast_enabled", _autocast)
dispatch_modes: Callable[[], int] = _found("_C._len_torch_dispatch_stack", lambda: 1)
functorch_level: Callable[[], Any] = _found("_C._functorch.peek_interpreter_stack", lambda: 0)
unwrap_if_dead: Callable[[Tensor], Tensor] = _found("_C._functorch.unwrap_if_dead", lambda x: x)
profiler_event: Callable[..., Any] = _found("_C._profiler._RecordFunctionFast", _recorded)
graph_is_kept: Callable[[], bool] = _found(
    "_C._autograd._get_current_graph_task_keep_graph", lambda: True
)
negated: Callable[[Tensor], Tensor] = _found("_neg_view", torch.neg)
# Whether a hook sits on all modules.
any_global_hook: Callable[[], bool] = _found("nn.modules.module._has_any_global_hook", lambda: True)
is_view: Callable[[Tensor], bool] = _found("Tensor._is_view", lambda _: True)
Dropout: Any = _found("nn.modules.dropout._DropoutNd", (nn.Dropout, nn.Dropout2d, nn.Dropout3d))
# Tells whether tensors are like others; None: every call is found by its key.
TensorGuards: Any = _found("_C._dynamo.guards.TensorGuards", None)

# Modules whose variables change: read as profiling_state._is_profiler_enabled.
profiling_state: Any = profiler
if _found("autograd.profiler._is_profiler_enabled", None) is None:
    profiling_state = SimpleNamespace(_is_profiler_enabled=False)
tangents: Any = forward_ad
if _found("autograd.forward_ad._current_level", None) is None:
    tangents = SimpleNamespace(_current_level=0)


def _none(_: Any) -> None:
    return None


# The tensor that this one is a view of; None where there is none, or where that is not known.
base: Callable[[Tensor], Tensor | None] = _none
if _found("Tensor._base", None) is not None:
    base = operator.attrgetter("_base")
_storage: Callable[[Any], int] = torch.UntypedStorage.data_ptr
if _found("UntypedStorage._cdata", None) is not None:
    _storage = operator.attrgetter("_cdata")


def functionalized(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as programs hold it: nothing in place."""
    try:
        from torch._subclasses.functional_tensor import dispatch_functionalize
    except ImportError:
        return torch.func.functionalize(function)
    return dispatch_functionalize(function)  # type: ignore[no-any-return]


def constant(function: Callable[..., Any]) -> None:
    """Compilers call `function` once and take its result for a constant.

    What torch.compiler.assume_constant_result does, without its import of torch._dynamo, which
    would triple the time of `import mbm_kernels`. A compiler that does not know the mark traces the
    function.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]


def allowing_rnn() -> AbstractContextManager[Any]:
    """Within it Dynamo traces an RNN."""
    from torch._dynamo import config

    return config.patch(allow_rnn=True)  # type: ignore[no-any-return]


def tables_of_types(builder: Any) -> Callable[[bool], dict[type, Any]] | None:
    """Dynamo's table of what it traces by type; None where it has none: the graph breaks."""
    return getattr(getattr(builder, "VariableBuilder", None), "_type_dispatch_impl", None)


def storage_of(tensor: Tensor) -> int:
    """What two tensors that share memory have in common, fake ones too."""
    return _storage(tensor.untyped_storage())


def backward_node(function: type[torch.autograd.Function]) -> type:
    """The class whose name the profiler shows for the backward."""
    return getattr(function, "_backward_cls", None) or type("Backward", (), {})


def packet(registered: Any) -> Any:
    """All overloads of a registered operation, by which FLOP counters know it."""
    namespace, name = registered.name().split(".")[0].split("::")
    return getattr(getattr(torch.ops, namespace), name)
