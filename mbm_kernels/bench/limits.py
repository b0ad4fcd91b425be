"""Roofline: how near a time is to the limits of the machine.

The limits are measured on the same number of threads: arithmetic as float32 multiply-adds in
registers in the ISA in use, and memory at each level that data can come from: the larger of the
rates of a copy (bytes read and written) and of a sum, over data of that level's size. What fits in
a cache need not leave it: only the bytes beyond a level's size have to come from the next, and data
in the second level are bound by arithmetic alone.
"""

import functools
from dataclasses import dataclass

import torch

from mbm_kernels._core import native, processor, timing
from mbm_kernels.bench import machine

FMA_ITERATIONS = 200_000  # 0.6 ms at 4 GHz
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COPY_BYTES = 128 * 2**20
SECONDS = 0.4


@dataclass(frozen=True)
class Work:
    """What a call cannot do without: floating operations (an FMA is 2) and bytes moved once.

    Args:
        special: of them reciprocals, exponentials and the like, which a GPU has units of their own
            for.
        fewest: operations of an algorithm that needs fewer in float32, such as Winograd's.
    """

    operations: float
    bytes: float
    special: float = 0.0
    fewest: float | None = None


def in_dtype(work: Work, dtype: torch.dtype) -> Work:
    """`work`, which counts bytes of float32 tensors, in another dtype."""
    return Work(work.operations, work.bytes * dtype.itemsize / 4, work.special)


@dataclass(frozen=True)
class Limits:
    """Measured rates of this machine; `source` says of the arithmetic one how.

    Args:
        bytes_per_s: of main memory.
        last, second: bytes that fit in the last and in the second level of cache.
        last_bytes_per_s: the last level's rate.
    """

    operations_per_s: float
    bytes_per_s: float
    source: str = "float32 FMA in registers"
    last: float = 0.0
    second: float = 0.0
    last_bytes_per_s: float = float("inf")

    def least_seconds(self, work: Work) -> tuple[float, str]:
        """The largest of the bounds, and its name: "arithmetic", "cache" or "memory"."""
        operations = work.operations if work.fewest is None else work.fewest
        bounds = (
            (operations / self.operations_per_s, "arithmetic"),
            (max(0.0, work.bytes - self.second) / self.last_bytes_per_s, "cache"),
            (max(0.0, work.bytes - self.last) / self.bytes_per_s, "memory"),
        )
        return max(bounds)


@functools.cache
def measure(threads: int) -> Limits:
    """The limits on `threads` threads, best sample of each; measured once in a process."""
    cpu = native.cpu()
    operations = cpu.peak_operations() * FMA_ITERATIONS * threads

    def arithmetic() -> object:
        return cpu.peak_run(FMA_ITERATIONS, threads)

    second, last = processor.cache_bytes()
    with timing.threads(threads), torch.no_grad():
        fma = timing.interleave({"fma": arithmetic}, SECONDS)["fma"].min()
        main = _bytes_per_s(COPY_BYTES)
        # Half of the level for both tensors, where that leaves the second level far behind.
        cached = _bytes_per_s(last // 4) if last >= 8 * second else float("inf")
    return Limits(
        float(operations / fma) * 1e9,
        main,
        last=last,
        second=min(second, threads * second // max(1, machine.cores())),
        last_bytes_per_s=max(main, cached),
    )


def _bytes_per_s(size: int) -> float:
    source = torch.ones(size // 4)
    target = torch.zeros_like(source)
    calls: dict[str, timing.Call] = {
        "copy": lambda: target.copy_(source),
        "sum": lambda: source.sum(),
    }
    times = timing.interleave(calls, SECONDS)
    rates = (2 * size / times["copy"].min(), size / times["sum"].min())
    return float(max(rates)) * 1e9
