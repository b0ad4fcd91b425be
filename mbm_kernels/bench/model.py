"""Predicted times of a GPU that is not here: counted work over datasheet rates, for the terminal.

A prediction is a bound that no kernel beats on these rates, not a result: it is never written to a
results file.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mbm_kernels.bench.benchmark import Benchmark
from mbm_kernels.bench.limits import DTYPES, Work, in_dtype


@dataclass(frozen=True)
class GpuModel:
    """Rates per second: bytes of device memory, operations by dtype, special functions."""

    name: str
    bytes: float
    operations: dict[torch.dtype, float]
    special: float
    source: str

    def seconds(self, work: Work, dtype: torch.dtype) -> dict[str, float]:
        """The least time of each unit."""
        return {
            "memory": work.bytes / self.bytes,
            "arithmetic": work.operations / self.operations[dtype],
            "special functions": work.special / self.special,
        }


MODELS = {
    "h100": GpuModel(
        "h100",
        3.35e12,
        {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 67e12},
        16 * 132 * 1.755e9,
        "H100 SXM datasheet; 16 special functions a clock and multiprocessor, 132 at 1.755 GHz",
    )
}


def predict(
    benchmarks: Sequence[Benchmark], model: GpuModel, case: str | None, dtypes: Sequence[str]
) -> list[list[str]]:
    """Table rows: what, dtype, least microseconds, the unit that bounds, busy shares."""
    rows = []
    for benchmark in benchmarks:
        if benchmark.work is None:
            continue
        for shape in benchmark.gpu_cases:
            if case and case.lower() not in shape.label.lower():
                continue
            for which in shape.passes:
                for dtype in dtypes:
                    work = in_dtype(benchmark.work(shape, which), DTYPES[dtype])
                    times = model.seconds(work, DTYPES[dtype])
                    bound = max(times, key=times.__getitem__)
                    shares = ", ".join(f"{u} {t / times[bound]:.0%}" for u, t in times.items() if t)
                    what = f"{benchmark.op} {shape.label}, {which}"
                    rows.append([what, dtype, f"{times[bound] * 1e6:.1f}", bound, shares])
    return rows


def print_table(rows: Sequence[Sequence[str]], model: GpuModel) -> None:
    from rich.console import Console
    from rich.table import Table

    title = (
        f"PREDICTED, not measured: least time on {model.name}, a bound without launches and latency"
        f"\n({model.source})"
    )
    table = Table("operation, case, pass", "dtype", "least µs", "bound by", "busy", title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
