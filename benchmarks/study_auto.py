"""Our CPU kernel beside the torch backend on shapes drawn at random: what `auto` has to choose.

    python -m benchmarks.study_auto [OP ...] [--seconds 120] [--threads 2]

Sizes are log-uniform, off the benchmarks' grid, in the ranges of DRAWS. Both backends are timed in
the same rounds, forward and forward+backward. A row is written as it is measured, into
results/<device>/<date>-<commit>-auto.jsonl, with the sizes that dispatch tables judge by; the table
printed at the end says, for each operation and pass, how often the kernel won and what the present
rules lose against always choosing right.
"""

import importlib
import json
import math
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from mbm_kernels._core import dispatch
from mbm_kernels.bench import isa, machine, results, timing
from mbm_kernels.bench.benchmark import BOTH, FORWARD, PASSES, Case, prepare, watch

HERE = Path(__file__).resolve().parent
MOST_PRODUCTS = 2e9  # multiply-adds of a forward pass: 50 ms on two cores
Draw = Callable[[random.Random], tuple[dict[str, int], dict[str, Any], float]]


def size(rng: random.Random, least: int, most: int) -> int:
    return round(math.exp(rng.uniform(math.log(least), math.log(most))))


def _additive(rng: random.Random) -> Any:
    b, t, s, d = size(rng, 1, 64), size(rng, 1, 40), size(rng, 8, 300), size(rng, 32, 700)
    return {"B": b, "T": t, "S": s, "D": d, "E": d}, {}, 8.0 * b * t * s * d


def _gru(rng: random.Random) -> Any:
    b, t, c, h = size(rng, 1, 64), size(rng, 1, 64), size(rng, 32, 800), size(rng, 32, 1024)
    return {"B": b, "T": t, "C": c, "H": h}, {}, 3.0 * b * t * h * (c + h)


def _gru_cell(rng: random.Random) -> Any:
    b, c, h = size(rng, 1, 320), size(rng, 16, 800), size(rng, 32, 1024)
    return {"B": b, "C": c, "H": h}, {}, 3.0 * b * h * (c + h)


def _cross(rng: random.Random) -> Any:
    b, n, t, s = size(rng, 1, 32), size(rng, 1, 12), size(rng, 1, 128), size(rng, 16, 400)
    d, need = rng.choice([16, 24, 32, 40, 48, 64, 80, 96]), rng.choice([None, "mean", "heads"])
    sizes = {"B": b, "N": n, "T": t, "S": s, "D": d}
    return sizes, {} if need is None else {"need_weights": need}, 2.0 * b * n * t * s * d


def _topk(rng: random.Random) -> Any:
    r, h, v, k = size(rng, 1, 320), size(rng, 64, 800), size(rng, 200, 12000), size(rng, 1, 8)
    return {"R": r, "H": h, "V": v, "k": k}, {}, 1.0 * r * h * v


def _cross_entropy(rng: random.Random) -> Any:
    n, h, v = size(rng, 8, 1280), size(rng, 64, 800), size(rng, 200, 12000)
    return {"N": n, "H": h, "V": v}, {}, 3.0 * n * h * v


def _distillation(rng: random.Random) -> Any:
    n, hs, ht, v = (
        size(rng, 8, 1280),
        size(rng, 64, 600),
        size(rng, 64, 1100),
        size(rng, 200, 12000),
    )
    return {"N": n, "Hs": hs, "Ht": ht, "V": v}, {}, 1.0 * n * v * (3 * hs + ht)


def _contrastive(rng: random.Random) -> Any:
    b, d = size(rng, 8, 2048), size(rng, 32, 800)
    return {"B": b, "D": d}, {"kind": rng.choice(["infonce", "siglip"])}, 3.0 * b * b * d


def _conv(rng: random.Random) -> Any:
    kernel, side = rng.choice([3, 3, 3, 3, 1, 5, 7]), size(rng, 7, 112)
    b, c, k = size(rng, 1, 32), size(rng, 3, 512), size(rng, 16, 512)
    options: dict[str, Any] = {"activation": rng.choice([None, "relu"])}
    if rng.random() < 0.2:
        c = k = size(rng, 32, 512)
        options["groups"] = c
    if kernel == 3 and rng.random() < 0.3 and side > 8:
        options["max_pool"] = 2
    if rng.random() < 0.2:
        options["stride"] = 2
    if rng.random() < 0.3:
        options["nchw"] = True
    products = (
        b * k * c / options.get("groups", 1) * (kernel * side / options.get("stride", 1)) ** 2
    )
    return {"B": b, "C": c, "K": k, "Y": side, "k": kernel}, options, products


DRAWS: dict[str, Draw] = {
    "additive_attention": _additive,
    "gru": _gru,
    "gru_cell": _gru_cell,
    "cross_attention": _cross,
    "linear_topk": _topk,
    "linear_cross_entropy": _cross_entropy,
    "linear_distillation_loss": _distillation,
    "contrastive_loss": _contrastive,
    "conv_bias_act": _conv,
}


def measure(op: str, case: Case, which: str, threads: int) -> dict[str, Any]:
    """One row: nanoseconds of a call by each backend, medians of interleaved rounds."""
    benchmark = importlib.import_module(f"benchmarks.bench_{op}").BENCHMARK
    inputs = benchmark.inputs(case)
    diff = benchmark.differentiable(inputs)
    calls = {
        name: prepare(benchmark.mbm(name), inputs, diff).call(which) for name in ("cpu", "torch")
    }
    sizes = watch(benchmark, case, which, "cpu").sizes[op] | {"training": int(which == BOTH)}
    times = timing.interleave(calls, 0.15, min_rounds=5, max_rounds=40)
    ratio = times["torch"] / times["cpu"]
    return {
        "op": op,
        "sizes": case.sizes,
        "options": case.options,
        "pass": which,
        "threads": threads,
        "dispatch_sizes": sizes,
        "auto": dispatch.select(op, "auto", torch.device("cpu"), torch.float32, sizes),
        **{f"{name}_ns": round(float(np.median(t))) for name, t in times.items()},
        "ratio": round(float(np.median(ratio)), 4),
        "p20": round(float(np.quantile(ratio, 0.2)), 4),
        "p80": round(float(np.quantile(ratio, 0.8)), 4),
    }


def drawn(op: str, rng: random.Random) -> Case:
    while True:
        sizes, options, products = DRAWS[op](rng)
        if products <= MOST_PRODUCTS:
            return Case(sizes, options)


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'operation':26}{'pass':18}{'rows':>5}{'won':>6}{'geomean':>9}{'auto loses':>12}")
    for op in DRAWS:
        for which in PASSES:
            some = [r for r in rows if r["op"] == op and r["pass"] == which]
            if not some:
                continue
            best = sum(min(r["cpu_ns"], r["torch_ns"]) for r in some)
            taken = sum(r[f"{r['auto']}_ns"] for r in some)
            won = sum(r["ratio"] > 1 for r in some) / len(some)
            mean = math.exp(sum(math.log(r["ratio"]) for r in some) / len(some))
            print(f"{op:26}{which:18}{len(some):5}{won:6.0%}{mean:9.2f}{taken / best - 1:12.1%}")


def main(
    ops: Annotated[list[str] | None, typer.Argument(help="operations; default: all")] = None,
    seconds: Annotated[float, typer.Option(help="for each operation")] = 120.0,
    threads: Annotated[int, typer.Option(help="torch threads")] = 2,
    seed: Annotated[int, typer.Option(help="of the shapes drawn")] = 0,
) -> None:
    torch.set_num_threads(threads)
    commit = machine.commit(HERE)
    head = {"schema": results.SCHEMA, "device": machine.device(), "commit": commit, "local": False}
    head |= {"machine": machine.facts(), "isa": isa.record()}
    isa.check(head["isa"])
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    path = HERE / "results" / machine.device() / f"{date}-{(commit or 'nocommit')[:7]}-auto.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with path.open("w") as file:
        file.write(json.dumps(head) + "\n")
        for op in ops or DRAWS:
            rng, end = random.Random(f"{op} {seed}"), time.monotonic() + seconds
            while time.monotonic() < end:
                case = drawn(op, rng)
                for which in (FORWARD,) if op == "linear_topk" else PASSES:
                    rows.append(measure(op, case, which, threads))
                    file.write(json.dumps(rows[-1]) + "\n")
                    file.flush()
    print_table(rows)
    print(path)


if __name__ == "__main__":
    typer.run(main)
