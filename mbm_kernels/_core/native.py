"""The compiled extensions, loaded once and after torch, so that they share its OpenMP runtime."""

import functools
import importlib
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, overload

import torch  # before _C_cpu: its libgomp must be the one that gets mapped
from torch import Tensor

from mbm_kernels._core import env

_CPU = torch.device("cpu")  # 0.2 us less than its name, in each call
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the last two rounded on store


@functools.cache
def _load_cpu() -> tuple[ModuleType | None, str | None]:
    try:
        extension = importlib.import_module("mbm_kernels._C_cpu")
    except ImportError as error:
        return None, f"the extension _C_cpu did not load ({error}); compile it with: make build"
    wanted = env.isa()
    if wanted is not None:
        extension.set_isa(wanted)
    return extension, None


@functools.cache
def _load_cuda() -> tuple[ModuleType | None, str | None]:
    try:
        extension = importlib.import_module("mbm_kernels._C_cuda")
    except ImportError as error:
        return (
            None,
            f"the extension _C_cuda did not load ({error}); nvcc builds it",
        )
    reason = extension.why_not()
    return extension, None if reason is None else f"_C_cuda is built, but CUDA said: {reason}"


def cpu() -> ModuleType:
    module, reason = _load_cpu()
    if module is None:
        raise ImportError(reason)
    return module


def cuda() -> ModuleType:
    module, reason = _load_cuda()
    if module is None:
        raise ImportError(reason)
    return module


def cpu_reason() -> str | None:
    """None when the CPU kernels can run in this process, else why not."""
    return _load_cpu()[1]


def why_not(device: Any, dtype: Any) -> str | None:
    """The reasons why not that every backend_cpu shares."""
    if device is not None and torch.device(device).type != "cpu":
        return f"it runs on cpu tensors, not {torch.device(device).type}"
    if dtype is not None and dtype not in DTYPES:
        return f"it computes in float32, which would round {dtype}"
    return cpu_reason()


def address(tensor: Tensor | None) -> int:
    """The tensor's address as the bindings take it, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def block(fields: Sequence[str], values: Mapping[str, int]) -> bytes:
    """The argument block that a kernel reads (csrc/common/problem_block.h): a value per field.

    Raises:
        KeyError: a field has no value.
        struct.error: a value has no field, or does not fit into 64 bits.
    """
    return struct.pack(f"{len(values)}q", *(values[name] for name in fields))


def float_bits(value: float) -> int:
    """The bits of a float64, as a field of a block holds them."""
    found: int = struct.unpack("q", struct.pack("d", value))[0]
    return found


@functools.lru_cache(maxsize=4096)
def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def empty(shape: tuple[int, ...]) -> Tensor:
    """Contiguous float32 for a kernel to write, whatever the default dtype and device are."""
    # 2.4 us; torch.empty takes 3.9
    strides = contiguous_strides(shape)
    return torch.empty_strided(shape, strides, dtype=torch.float32, device=_CPU)


def empty_where(
    shapes: Sequence[tuple[int, ...] | None], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """`empty` of each shape that is wanted, None for the others."""
    return [
        empty(shape) if needed and shape is not None else None
        for shape, needed in zip(shapes, wanted, strict=True)
    ]


@overload
def dense(tensor: Tensor) -> Tensor: ...
@overload
def dense(tensor: Tensor | None) -> Tensor | None: ...
def dense(tensor: Tensor | None) -> Tensor | None:
    """Contiguous float32."""
    # 0.2 us; .to() takes 0.7
    if tensor is None or (tensor.dtype is torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.to(torch.float32).contiguous()


def rows(x: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, tuple[int, int, int]]:
    """[B, R, C] in `dtype` whose C is contiguous, and (address, stride of B, stride of R).

    The tensor has to live until the kernel has read it.
    """
    if x is None:
        return None, (0, 0, 0)
    x = x.to(dtype)
    if x.stride(2) != 1:
        x = x.contiguous()
    return x, (x.data_ptr(), x.stride(0), x.stride(1))


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """`address` of each."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def extent(tensor: Tensor) -> int:
    """Bytes between a tensor's first and its last element.

    Raises:
        ValueError: the tensor's storage was freed or is too small for its shape.
    """
    found = int(tensor.nbytes)
    if not tensor.is_contiguous() and found > 0:
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        last = sum((size - 1) * stride for size, stride in steps)
        found = (last + 1) * tensor.element_size()
    start = tensor.storage_offset() * tensor.element_size()
    held = tensor.untyped_storage().nbytes()
    if found > 0 and held < start + found:
        raise ValueError(
            f"weight: got a tensor of shape {tuple(tensor.shape)} whose storage holds {held} "
            f"bytes; expected {start + found}; restore the storage before the call"
        )
    return found


def fingerprint(tensor: Tensor) -> int:
    """A 64-bit hash of every byte of a CPU tensor (csrc/common/fingerprint.h).

    Of a tensor with gaps the bytes between its first and its last element are hashed.

    Raises:
        ValueError: the tensor's storage was freed or is too small for its shape.
    """
    held = extent(tensor)
    found: int = cpu().fingerprint(tensor.data_ptr(), held, torch.get_num_threads())
    return found


_NO_INDEX = -(2**63)


def index_range(index: Tensor, ignored: int = _NO_INDEX) -> tuple[int, int, int]:
    """The least and the greatest of int64 indices on the CPU, and how many are `ignored`, which do
    not count; 0 and -1 where none counts."""
    if index.is_contiguous() and cpu_reason() is None:
        low, high, count = cpu().index_range(index.data_ptr(), index.numel(), ignored)
    else:
        counted = index[index != ignored]
        count = index.numel() - counted.numel()
        low, high = map(int, torch.aminmax(counted)) if counted.numel() else (0, -1)
    if ignored == _NO_INDEX and count > 0:
        low, high = ignored, max(high, ignored)
    return (low, high, count) if low <= high else (0, -1, count)


def release_scratch() -> None:
    """Frees the working memory that CPU kernels keep for their next call, up to 16 MiB a thread."""
    module, _ = _load_cpu()
    if module is not None:
        module.release_scratch(torch.get_num_threads())


def cuda_reason() -> str | None:
    return _load_cuda()[1]


def isa() -> str | None:
    module, _ = _load_cpu()
    return None if module is None else str(module.isa())


def isas() -> list[str]:
    """The code paths that run here; "avx512_lowered" is AVX-512's made of AVX2, for tests."""
    module, _ = _load_cpu()
    names = (*env.ISAS, "avx512_lowered")
    return [] if module is None else [name for name in names if module.runs_isa(name)]


def openmp_runtimes() -> list[str]:
    """File names of the OpenMP runtimes mapped into this process; more than one is a conflict."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    pattern = re.compile(r"/([^/\s]*lib(?:gomp|iomp5|omp)[^/\s]*\.so[^/\s]*)")
    return sorted(set(pattern.findall(maps.read_text())))
