"""Lets torch.compile trace nn.GRU.

Dynamo breaks the graph at every instance of torch.nn.GRU, of subclasses too, unless its global
`allow_rnn` is set, which is about tracing aten::gru. Ours calls one registered op for each layer,
so it is allowed, and only it: the flag is on for no other module.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

BUILDER = "torch._dynamo.variables.builder"
_classes: list[type] = []


def traceable(module: type) -> None:
    """Dynamo traces into instances of exactly this subclass of torch.nn.GRU."""
    _classes.append(module)
    if BUILDER in sys.modules:
        _allow(sys.modules[BUILDER])


def _allow(builder: ModuleType) -> None:
    tables = getattr(getattr(builder, "VariableBuilder", None), "_type_dispatch_impl", None)
    if tables is None:  # another torch than 2.11 to 2.13: the graph breaks, as at torch.nn.GRU
        return
    for trace_numpy in (True, False):
        tables(trace_numpy).update(dict.fromkeys(_classes, _wrap))


def _wrap(builder: Any, value: Any) -> Any:
    from torch._dynamo import config

    with config.patch(allow_rnn=True):
        return builder.wrap_module(value)


class _WhenImported(MetaPathFinder):
    """Runs `_allow` on the builder once that is imported: importing it here would take 2 s."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != BUILDER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _allow(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if BUILDER not in sys.modules:
    sys.meta_path.insert(0, _WhenImported())
