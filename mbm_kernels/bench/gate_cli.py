"""`mbm-kernels gate`: compiled kernels against their recorded resources; no GPU is needed."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mbm_kernels._core import dispatch, triton_launch
from mbm_kernels.bench import gate, static, static_cases

app = typer.Typer(
    help="Hold compiled kernels to what benchmarks/ records of them.", no_args_is_help=True
)
EXIT_MOVED = 1


@app.callback()
def root() -> None:
    """Hold compiled kernels to what benchmarks/ records of them."""


@app.command(name="static")
def static_gate(
    op: Annotated[
        list[str] | None, typer.Option("--op", help="Repeatable; without one, all.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Every dtype, configuration and target.")
    ] = False,
    update: Annotated[bool, typer.Option("--update", help="Record what moved.")] = False,
    because: Annotated[
        str | None, typer.Option("--because", help="Why a kernel may spill or be over 5 % worse.")
    ] = None,
    folder: Annotated[Path, typer.Option("--folder", help="Of the baselines, <op>.json.")] = Path(
        "benchmarks/static"
    ),
    cache: Annotated[
        Path | None,
        typer.Option("--cache", help="Of compilations; without it below MBM_CACHE."),
    ] = None,
) -> None:
    """Compile the Triton kernels for GPUs and compare registers, spills, ... with the baseline.

    Without --full: the configuration that each case runs with, float32 and bfloat16, sm_90 and
    gfx942. Anything new, worse or better fails until --update records it.
    """
    if triton_launch.interpreting():
        raise ValueError("gate: got TRITON_INTERPRET=1; expected the compiler; unset it")
    ops = op or sorted({case.op for case in static_cases.CASES})
    for name in ops:
        dispatch.check_op(name)
        if not list(static_cases.of(name)):
            raise ValueError(
                f"gate: --op: got {name}, which has no Triton kernel; "
                f"expected one of {', '.join(sorted({c.op for c in static_cases.CASES}))}"
            )
    versions = static.versions()
    dtypes = tuple(gate.DTYPES) if full else gate.DEFAULT_DTYPES
    targets = tuple(static.TARGETS) if full else gate.DEFAULT_TARGETS
    failed = False
    for name in ops:
        path = folder / f"{name}.json"
        baseline = gate.read_baseline(path)
        if not update:
            gate.check_versions(baseline, versions, path)
        before = {k: _metrics(v) for k, v in baseline["kernels"].items()}
        now = gate.measure(name, dtypes, targets, full, cache or static.default_cache())
        moves = gate.compare(before, now, whole=full)
        typer.echo(f"{name}: {len(now)} compilations, {len(moves)} moved")
        for move in moves:
            typer.echo(f"  {gate.describe(move)}")
        if update:
            gate.update(path, baseline, now, moves, versions, because)
        failed |= bool(moves) and not update
    if failed:
        typer.echo("gate: resources moved; look at the table, then record them with --update")
        raise typer.Exit(EXIT_MOVED)


def _metrics(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "because"}
