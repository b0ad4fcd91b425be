"""Lets torch.compile trace nn.GRU.

Dynamo breaks the graph at every instance of torch.nn.GRU, of subclasses too, unless its global
`allow_rnn` is set, which is about tracing aten::gru. Ours calls one registered op for each layer,
so it is allowed, and only it: the flag is on for no other module.
"""

from types import ModuleType
from typing import Any

from mbm_kernels._core import torch_private
from mbm_kernels._core.when_imported import when_imported

BUILDER = "torch._dynamo.variables.builder"  # importing it here would take 2 s


def traceable(module: type) -> None:
    """Dynamo traces into instances of exactly this subclass of torch.nn.GRU."""
    when_imported(BUILDER, lambda builder: _allow(builder, module))


def _allow(builder: ModuleType, module: type) -> None:
    tables = torch_private.tables_of_types(builder)
    if tables is None:  # another torch than 2.11 to 2.13: the graph breaks, as at torch.nn.GRU
        return
    for trace_numpy in (True, False):
        tables(trace_numpy)[module] = _wrap


def _wrap(builder: Any, value: Any) -> Any:
    with torch_private.allowing_rnn():
        return builder.wrap_module(value)
