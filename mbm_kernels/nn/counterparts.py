"""Which of our modules stands for which of torch's, and the change of an instance into the other.

The instance stays the same object with the same parameters, buffers, hooks, flags and names: only
its class changes, to a subclass of the one that it had, and back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

from torch import Tensor, nn
from torch.nn.utils import parametrize

from mbm_kernels._core import checks
from mbm_kernels._core.dispatch import why_not as backend_why_not
from mbm_kernels._core.drop_in import refuse_script
from mbm_kernels.ops.conv_bias_act.module import Conv1d, Conv2d
from mbm_kernels.ops.cross_attention.module import MultiheadAttention
from mbm_kernels.ops.gru.module import GRU
from mbm_kernels.ops.gru_cell.module import GRUCell


class Counterpart(NamedTuple):
    """Our class for one of torch's, and the operation that it runs."""

    op: str
    stock: type[nn.Module]
    ours: type[nn.Module]


COUNTERPARTS = (
    Counterpart("conv_bias_act", nn.Conv2d, Conv2d),
    Counterpart("conv_bias_act", nn.Conv1d, Conv1d),
    Counterpart("gru", nn.GRU, GRU),
    Counterpart("gru_cell", nn.GRUCell, GRUCell),
    Counterpart("cross_attention", nn.MultiheadAttention, MultiheadAttention),
)


def of(module: nn.Module) -> Counterpart | None:
    """The counterpart of a module of torch, of a subclass of it, or of ours."""
    return next((c for c in COUNTERPARTS if isinstance(module, c.stock)), None)


def why_not(module: nn.Module) -> str | None:
    """Why a module that has a counterpart must keep its class; None where it may change."""
    known = of(module)
    assert known is not None
    kind = type(module)
    if isinstance(module, known.ours):
        return "it is a module of mbm_kernels already"
    if parametrize.is_parametrized(module):
        return "its weights are parametrized"
    if kind is not known.stock:
        stock = f"torch.nn.{known.stock.__name__}"
        return f"its class is {kind.__module__}.{kind.__qualname__}, a subclass of {stock}"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if any(isinstance(value, Tensor) for value in vars(module).values()):
        return "its weight is computed by a hook (weight_norm, spectral_norm or pruning)"
    for parameter in module.parameters():
        if parameter.dtype not in checks.FLOATING:
            return f"its dtype is {str(parameter.dtype).removeprefix('torch.')}"
    return None


def kernel_of(op: str, parameter: Tensor | None) -> tuple[str | None, str | None]:
    """The backend other than torch that runs `op` on tensors like this one, or None and why."""
    if parameter is None:
        return None, "it has no parameters"
    reasons = []
    for backend in ("cpu", "cuda", "triton"):
        reason = backend_why_not(op, backend, parameter.device, parameter.dtype)
        if reason is None:
            return backend, None
        reasons.append(f"{backend}: {reason}")
    return None, "; ".join(reasons)


class RunsChains(nn.Module):
    """A container that runs several of its modules as one operation, as long as they stay."""

    def in_chains(self) -> set[nn.Module]:
        """Those modules."""
        raise NotImplementedError

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)


def in_chains(model: nn.Module) -> set[nn.Module]:
    """The modules of a model that some container runs in chains: they keep their class."""
    containers = (m for m in model.modules() if isinstance(m, RunsChains))
    return {module for container in containers for module in container.in_chains()}


def swap(module: nn.Module, backend: str = "auto") -> None:
    """Makes a module of torch the one of ours that stands for it."""
    known = of(module)
    assert known is not None
    assert type(module) is known.stock
    module.__class__ = known.ours
    module.backend = backend  # type: ignore[assignment]


def restore(module: nn.Module) -> None:
    """Undoes `swap`."""
    known = of(module)
    assert known is not None
    assert type(module) is known.ours
    module.backend = "auto"  # type: ignore[assignment]
    module.__class__ = known.stock
    for name in ("backend", "_stock_calls"):
        vars(module).pop(name, None)


@contextmanager
def swapped(modules: list[nn.Module]) -> Iterator[None]:
    """Within it these modules of torch are ours."""
    for module in modules:
        swap(module)
    try:
        yield
    finally:
        for module in modules:
            restore(module)


def first_tensor(module: nn.Module) -> Tensor | None:
    """A parameter, by which device and dtype are known."""
    return next(module.parameters(), None)


def named(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have a counterpart, each once, by their first name."""
    return {name: module for name, module in model.named_modules() if of(module) is not None}


def label(module: nn.Module) -> str:
    """A module's class for people, as torch.nn.Conv2d."""
    kind: Any = type(module)
    if kind.__module__.startswith("torch.nn."):
        return f"torch.nn.{kind.__name__}"
    if kind.__module__.startswith("mbm_kernels."):
        return f"mbm_kernels.nn.{kind.__name__}"
    return str(kind.__name__)


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook sees what goes into the module or comes out of it, or their gradients."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
