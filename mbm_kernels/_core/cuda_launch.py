"""Where the CUDA C++ kernels run: on the tensors' device, or for tests emulated on the host.

Emulated kernels are the same sources with CUDA threads as fibers (csrc/common/gpu/emulation.h), in
an extension of their own that builds in place make.
"""

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from mbm_kernels._core import dispatch, native

_emulates = False
_emulates_tf32 = False  # PyTorch's own setting is on by default, and says nothing of a CPU


def why_not(device: Any, dtype: Any) -> str | None:
    """What every backend_cuda answers, before anything of its own."""
    if dtype is not None and dtype not in native.DTYPES:
        return f"it computes in float32, which would round {dtype}"
    kind = None if device is None else torch.device(device).type
    if _emulates:
        return None if kind in (None, "cpu") else f"it is emulated on the cpu, not on {kind}"
    if not torch.cuda.is_available():
        return "no CUDA device: torch sees none"
    if kind not in (None, "cuda"):
        return f"it runs on cuda tensors, not {kind}"
    return native.cuda_reason()


def module() -> ModuleType:
    return emulation() if _emulates else native.cuda()


def rnn_tf32() -> bool:
    """Whether PyTorch lets cuDNN round the factors of a recurrence's float32 products to tf32."""
    if _emulates:
        return _emulates_tf32
    precision: str = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    return precision == "tf32"


def max_cluster(device: torch.device) -> int:
    """Blocks of the largest portable thread-block cluster; 1 where the device has none."""
    found: int = module().max_cluster(place(device)[0])
    return found


def place(device: torch.device) -> tuple[int, int]:
    """The device and the stream of a launch, as the bindings take them."""
    if _emulates:
        return 0, 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch.cuda.current_stream(index).cuda_stream


@functools.cache
def emulation() -> ModuleType:
    """The extension that emulates.

    Raises:
        ImportError: it is not built.
    """
    return importlib.import_module("mbm_kernels._C_cuda_emulated")


@contextmanager
def emulated(tf32: bool = False) -> Iterator[ModuleType]:
    """Within this context the cuda backends run on CPU tensors, in this process's every thread."""
    global _emulates, _emulates_tf32
    before, found = (_emulates, _emulates_tf32), emulation()
    _emulates, _emulates_tf32 = True, tf32
    dispatch.forget_choices()
    try:
        yield found
    finally:
        _emulates, _emulates_tf32 = before
        dispatch.forget_choices()
