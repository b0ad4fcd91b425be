"""Lets torch.compile trace nn.GRU.

Dynamo breaks the graph at every instance of torch.nn.GRU, of subclasses too, unless its global
`allow_rnn` is set, which is about tracing aten::gru. Ours calls one registered op for each layer,
so it is allowed, and only it: the flag is on for no other module.
"""

from typing import Any

from torch._dynamo import config
from torch._dynamo.variables.builder import VariableBuilder


def traceable(module: type) -> None:
    """Dynamo traces into instances of exactly this subclass of torch.nn.GRU."""
    tables = getattr(VariableBuilder, "_type_dispatch_impl", None)
    if tables is None:  # another torch than 2.11 to 2.13: the graph breaks, as at torch.nn.GRU
        return

    def wrap(builder: Any, value: Any) -> Any:
        with config.patch(allow_rnn=True):
            return builder.wrap_module(value)

    for trace_numpy in (True, False):
        tables(trace_numpy)[module] = wrap
