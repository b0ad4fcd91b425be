"""The most memory that a call adds to the process, where Linux's /proc tells."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from mbm_kernels._core import heap, native

PROC = Path("/proc/self")


def _status(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", (PROC / "status").read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(match.group(1)) * 1024


def result_bytes(results: Any) -> int:
    """Bytes of a call's results, each storage once: what any form of it has to allocate."""
    storages: dict[int, int] = {}
    pending = [results]
    while pending:
        item = pending.pop()
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, (tuple, list)):
            pending.extend(item)
    return sum(storages.values())


def peak_extra_bytes(call: Callable[[], object]) -> int | None:
    """VmHWM of one call minus VmRSS before it, its outputs included; None where it is not known.

    Working memory that our kernels keep from call to call is freed first, and so counts. The kernel
    counts in pages per thread, so that less than about 1 MiB is noise. Call it once before: packed
    weights would count too.
    """
    native.release_scratch()
    try:
        if not heap.trim():
            return None
        (PROC / "clear_refs").write_text("5")  # VmHWM = VmRSS
        before = _status("VmRSS")
        outputs = call()
        peak = _status("VmHWM")
    except OSError:
        return None
    del outputs
    return max(0, peak - before)
