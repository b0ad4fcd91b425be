"""What a GPU's time is spent on, most valuable first: each operation's first row before any second.

An operation that was never measured on a GPU comes before one that was, then the order of GOALS.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from mbm_kernels._core import dispatch
from mbm_kernels._core.op import OPS
from mbm_kernels.bench import results
from mbm_kernels.bench.benchmark import PASSES, Benchmark
from mbm_kernels.bench.gpu.worker import Task

GPU_BACKENDS = ("triton", "cuda")
# By what a win would be worth: first what torch has no kernel for and whose temporaries are the
# largest ([B, T, S, D], logits [N, V]), then what the captioner spends its time in, then what
# cuBLAS does well already, last the models, which take the longest to compile.
GOALS = (
    *("additive_attention", "linear_distillation_loss", "linear_cross_entropy", "gru"),
    *("conv_bias_act", "cross_attention", "linear_topk", "additive_attention_keys"),
    *("contrastive_loss", "gru_cell", "concat_linear", "multihead_attention"),
    *("decode_step", "captioner"),
)
TRAINED = ("linear_distillation_loss", "linear_cross_entropy", "contrastive_loss")


def gpu_backends(op: str) -> list[str]:
    """Those that run here, of a model any that one of its operations may take."""
    asked = [op] if op in OPS else list(OPS)
    return [b for b in GPU_BACKENDS if any(dispatch.why_not(name, b) is None for name in asked)]


def measured_before(base: Path) -> set[str]:
    """Operations with a row of a GPU among the results."""
    rows = (row for path in base.glob("nvidia*/*.json*") for row in results.read(path)["rows"])
    return {row["op"] for row in rows if row.get("backend") in GPU_BACKENDS and "mbm_ms" in row}


def tasks(
    benchmarks: Sequence[Benchmark], *, whole: bool, measured: Iterable[str] = ()
) -> list[Task]:
    """Without `whole` the quick cases in bfloat16, which goals are set for."""
    ranked: list[tuple[tuple[int, ...], Task]] = []
    done = set(measured)
    for benchmark in benchmarks:
        op = benchmark.op
        place = GOALS.index(op) if op in GOALS else len(GOALS)
        for backend in gpu_backends(op):
            for dtype in ("bfloat16", "float32") if whole else ("bfloat16",):
                chosen = [
                    (case, which)
                    for which in (PASSES[::-1] if op in TRAINED else PASSES)
                    for case in benchmark.gpu_cases
                    if (whole or case.quick)
                    and which in case.passes
                    and benchmark.takes(case, backend)
                ]
                chosen.sort(key=lambda pair: not pair[0].quick)
                for turn, (case, which) in enumerate(chosen):
                    rank = (dtype != "bfloat16", not case.quick, turn, op in done, place)
                    ranked.append((rank, Task(op, case.label, which, dtype, backend)))
    return [task for _, task in sorted(ranked, key=lambda pair: pair[0])]


def smoke_tasks(benchmarks: Sequence[Benchmark]) -> list[Task]:
    """One for each operation and backend: with gradients where it has any."""
    found: list[Task] = []
    for benchmark in (b for b in benchmarks if b.op in OPS):
        for backend in gpu_backends(benchmark.op):
            found += _first_quick(benchmark, backend)
    return sorted(found, key=lambda task: GOALS.index(task.op) if task.op in GOALS else len(GOALS))


def _first_quick(benchmark: Benchmark, backend: str) -> list[Task]:
    """Of the first quick case that the backend takes, if there is one."""
    for case in benchmark.gpu_cases:
        if case.quick and benchmark.takes(case, backend):
            return [Task(benchmark.op, case.label, case.passes[-1], "bfloat16", backend)]
    return []


def cuda_tasks(benchmarks: Sequence[Benchmark]) -> list[Task]:
    """One call of each CUDA C++ kernel: of its operation and of what decodes with it."""
    found: list[Task] = []
    for benchmark in benchmarks:
        op = benchmark.op.removesuffix("_keys")
        if op not in OPS or dispatch.why_not(op, "cuda") is not None:
            continue
        found += _first_quick(benchmark, "cuda")
    return found


def groups(chosen: Sequence[Task], workers: int) -> list[list[Task]]:
    """For `workers` processes: rows of one case and dtype together, since they share kernels; the
    models, which take the longest, begin."""
    by_case: dict[tuple[str, ...], list[Task]] = {}
    for task in chosen:
        by_case.setdefault((task.op, task.case, task.dtype), []).append(task)
    units = sorted(by_case.values(), key=lambda unit: unit[0].op in OPS)
    return [[task for unit in units[i::workers] for task in unit] for i in range(workers)]
