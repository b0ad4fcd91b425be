"""Freed memory that stays mapped, so that calls with large tensors do not page-fault each time."""

from __future__ import annotations

import ctypes
import mmap
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from mbm_kernels._core import env

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # mallopt's parameters, malloc.h
# glibc's values at the start of a process.
DEFAULTS = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 128 << 10, M_TRIM_THRESHOLD: 128 << 10}
MOST = 2**31 - 1  # mallopt takes an int
PROBE_BYTES = 48 << 20  # an activation of 64 channels at 56 pixels and batch 60
CALLS = 24
_is_warm = False


class _Place(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("file_base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("symbol_base", ctypes.c_void_p),
    )


def why_not() -> str | None:
    """Why `warm_heap` cannot run in this process, None where it can."""
    if sys.platform != "linux":
        return f"the system is {sys.platform}, not Linux with glibc"
    libc: Any = ctypes.CDLL(None)
    if not all(hasattr(libc, name) for name in ("gnu_get_libc_version", "mallopt", "dladdr")):
        return "the C library is not glibc, whose malloc it sets"
    place = _Place()
    if not libc.dladdr(ctypes.cast(libc.malloc, ctypes.c_void_p), ctypes.byref(place)):
        return "the library that malloc comes from is not known"
    name = Path((place.file or b"").decode()).name
    return None if name.startswith("libc") else f"malloc comes from {name}, not from glibc"


def warm_heap(limit: int | None = None) -> None:
    """Keeps the memory that tensors free mapped in this process, for the next ones.

    By default glibc maps a large tensor anew at each call and unmaps it afterwards, and the kernel
    clears each page at its first use. Afterwards memory comes from the heap, and what is freed at
    the heap's end goes back to the system only beyond `limit`. Nothing is allocated here, and no
    result changes.

    Args:
        limit: bytes that may stay free at the heap's end, 1 to 2**31 - 1 (glibc never gives back
            what is free below a piece in use); None keeps everything; 0 goes back to glibc's
            values and returns what is free. After that thresholds no longer follow the sizes
            freed, as they do in a new process.

    Raises:
        RuntimeError: where malloc is not glibc's (musl, or another allocator preloaded).
        ValueError: for a limit out of range. TypeError: for one that is no integer.
    """
    if isinstance(limit, bool) or not isinstance(limit, int | None):
        raise TypeError(f"limit: got {type(limit).__name__}, expected an int or None")
    if limit is not None and not 0 <= limit <= MOST:
        raise ValueError(f"limit: got {limit}, expected 0 to {MOST} bytes, or None for no limit")
    if reason := why_not():
        raise RuntimeError(f"warm_heap: got no way to keep freed memory mapped: {reason}")
    warm = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1 if limit is None else limit}
    libc: Any = ctypes.CDLL(None)
    for parameter, value in (DEFAULTS if limit == 0 else warm).items():
        if libc.mallopt(parameter, value) != 1:
            raise RuntimeError(f"warm_heap: mallopt refused {value} for parameter {parameter}")
    global _is_warm
    _is_warm = limit != 0
    if limit == 0:
        trim()


def trim() -> bool:
    """Gives free pages of the heap back to the kernel; False where the C library cannot."""
    function = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if function is None:
        return False
    function(0)
    return True


def warm_if_asked() -> None:
    """`warm_heap()` where MBM_WARM_HEAP is 1; a warning where it cannot."""
    if not env.warm_heap():
        return
    try:
        warm_heap()
    except RuntimeError as error:
        warnings.warn(f"MBM_WARM_HEAP is not obeyed: {error}", RuntimeWarning, stacklevel=3)


def is_warm() -> bool:
    """Whether `warm_heap` is in force."""
    return _is_warm


def faults_per_call() -> int:
    """Page faults of a call that makes and frees one tensor of PROBE_BYTES, in this process.

    The fewest of CALLS: in the first ones small pieces that glibc keeps for the thread, seven of a
    size, may lie round the tensor's memory, so that the heap grows at its end instead.
    """
    import resource  # which Windows lacks

    fewest = PROBE_BYTES
    for _ in range(CALLS):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(PROBE_BYTES // 4, dtype=torch.float32).fill_(1.0)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        fewest = min(fewest, faults)
        if fewest == 0:
            break
    return fewest


def report() -> dict[str, Any]:
    """The state, and page faults per call now and with `warm_heap`, which is undone afterwards."""
    reason, warm = why_not(), is_warm()
    now = faults_per_call()
    after: int | None = now if warm else None
    if not warm and reason is None:
        warm_heap()
        try:
            after = faults_per_call()
        finally:
            warm_heap(0)
    return {
        "state": "warm" if warm else "default",
        "why_not_warm": reason,
        "probe_bytes": PROBE_BYTES,
        "page_bytes": mmap.PAGESIZE,
        "faults_per_call": now,
        "faults_per_call_warm": after,
    }
