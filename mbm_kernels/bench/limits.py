"""How near to the machine's limits a time is.

The limits are measured on the same number of threads: arithmetic as float32 multiply-adds in
registers in the ISA in use, and memory as the rate of copying 128 MiB, read and written bytes both
counted. A row whose bytes stay in cache can pass the memory limit.
"""

import functools
from dataclasses import dataclass

import torch

from mbm_kernels._core import native
from mbm_kernels.bench import timing

FMA_ITERATIONS = 200_000  # 0.6 ms at 4 GHz
COPY_BYTES = 128 * 2**20
SECONDS = 0.4


@dataclass(frozen=True)
class Work:
    """What a call cannot do without: floating operations (an FMA is 2) and bytes moved once.

    special: of them reciprocals, exponentials and the like, which a GPU has units of their own for.
    """

    operations: float
    bytes: float
    special: float = 0.0


@dataclass(frozen=True)
class Limits:
    """Measured rates of this machine; `source` says of the arithmetic one how."""

    operations_per_s: float
    bytes_per_s: float
    source: str = "float32 FMA in registers"

    def least_seconds(self, work: Work) -> tuple[float, str]:
        """The larger of the two bounds, and its name: "arithmetic" or "memory"."""
        arithmetic = work.operations / self.operations_per_s
        memory = work.bytes / self.bytes_per_s
        return (arithmetic, "arithmetic") if arithmetic >= memory else (memory, "memory")


@functools.cache
def measure(threads: int) -> Limits:
    """The limits on `threads` threads, best sample of each; measured once in a process."""
    cpu = native.cpu()
    source = torch.ones(COPY_BYTES // 4)
    target = torch.zeros_like(source)
    with timing.threads(threads), torch.no_grad():
        times = timing.interleave(
            {
                "fma": lambda: cpu.peak_run(FMA_ITERATIONS, threads),
                "copy": lambda: target.copy_(source),
            },
            SECONDS,
        )
    operations = cpu.peak_operations() * FMA_ITERATIONS * threads
    return Limits(operations / times["fma"].min() * 1e9, 2 * COPY_BYTES / times["copy"].min() * 1e9)
