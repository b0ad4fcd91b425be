"""What a rewritten forward runs in place of modules, as long as those are what they were."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mbm_kernels._core.unchanged import Watch
from mbm_kernels.nn import counterparts

Holder = tuple[dict[str, Any], str]


@dataclass(eq=False, kw_only=True)
class OfModules:
    """Stands for modules of a container.

    holders: of each module, the dictionary that its container finds it in, and its key there.
    """

    modules: tuple[nn.Module, ...] = ()
    holders: tuple[Holder, ...] = ()
    kinds: tuple[type, ...] = field(init=False)
    settings: tuple[dict[str, Any], ...] = field(init=False)

    def __post_init__(self) -> None:
        self.kinds = tuple(type(m) for m in self.modules)
        self.settings = tuple(_settings(m) for m in self.modules)

    def why_not(self) -> str | None:
        """Why its modules must run one by one, as they stand now; None where they need not."""
        parts = zip(self.modules, self.kinds, self.settings, self.holders, strict=True)
        for module, kind, settings, (owner, key) in parts:
            if owner.get(key) is not module:
                return f"{key!r} was replaced by another module"
            if type(module) is not kind or "forward" in vars(module):
                return f"the class or the forward of {key!r} was changed"
            if counterparts.has_hooks(module):
                return f"a hook sits on {key!r}"
            if module.training:
                return f"{key!r} is in training mode"
            if _settings(module) != settings:
                return f"settings of {key!r} were changed"
        return None

    def watch(self, watch: Watch) -> None:
        """Adds what `why_not` looks at."""
        for module, (owner, key) in zip(self.modules, self.holders, strict=True):
            watch.items(owner, (key,))
            watch.module(module, "training", *_settings(module))


def _settings(module: nn.Module) -> dict[str, Any]:
    """What its class names as constants (for TorchScript): slopes, strides, eps and the like."""
    names = getattr(type(module), "__constants__", ())
    return {name: vars(module)[name] for name in names if name in vars(module)}


def holder(container: nn.Module, path: str) -> Holder:
    """Where a container finds the module of this path."""
    owner, _, key = path.rpartition(".")
    return container.get_submodule(owner)._modules, key
