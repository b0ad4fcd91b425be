"""What our modules owe to tools of torch that look at a module's class.

A call pays for none of it.
"""

import functools
import warnings
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from mbm_kernels._core import packing, torch_private


class _QConfig:
    """The attribute `qconfig`, by which torch.ao.quantization marks each module that it meets."""

    def __get__(self, module: nn.Module | None, kind: type) -> Any:
        if module is None:
            return self
        try:
            return vars(module)["qconfig"]
        except KeyError:
            raise AttributeError("qconfig") from None

    def __set__(self, module: nn.Module, value: Any) -> None:
        vars(module)["qconfig"] = value
        # Dynamic quantization gives None to what is not of exactly the classes that it knows.
        if value is not None or isinstance(module, (nn.Linear, nn.RNNBase, nn.RNNCellBase)):
            warnings.warn(
                f"torch.ao.quantization changes modules of torch.nn's own classes alone: this "
                f"mbm_kernels.nn.{type(module).__name__} stays in floating point; call "
                "report.revert() first, or build the model from torch.nn",
                stacklevel=4,
            )

    def __delete__(self, module: nn.Module) -> None:
        del vars(module)["qconfig"]


class DropIn(nn.Module):
    """The first base of each of our modules."""

    qconfig = _QConfig()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if any(base.__module__.startswith("torch.distributed.fsdp") for base in cls.__bases__):
            # fully_shard's subclass of ours: an in-place operation on a view would drop the hook
            # that gathers the parameters for the backward.
            setattr(cls, "forward", _without_views(cls.forward))  # noqa: B010

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._forget_if_swapped()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget_if_swapped()
        super()._load_from_state_dict(*args, **kwargs)

    def _forget_if_swapped(self) -> None:
        """Lets torch.utils.swap_tensors have the parameters; it refuses weak references to them."""
        if torch.__future__.get_swap_module_params_on_conversion():
            for parameter in self.parameters():
                packing.forget(parameter)


def refuse_script(module: nn.Module) -> NoReturn:
    """Raises what torch.jit.script of a module of ours means."""
    raise RuntimeError(
        f"torch.jit.script: got {type(module).__name__}, run by mbm_kernels, which is no "
        "TorchScript; expected torch.nn's own modules; call report.revert() first, or use "
        "torch.export or torch.jit.trace"
    )


def _without_views(forward: Any) -> Any:
    @functools.wraps(forward)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _owned(forward(self, *args, **kwargs))

    return call


def _owned(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.clone() if result.requires_grad and torch_private.is_view(result) else result
    if isinstance(result, PackedSequence):
        return result._replace(data=_owned(result.data))
    return tuple(map(_owned, result)) if isinstance(result, tuple) else result
