"""`mbm-kernels gate`: compiled kernels against their recorded resources; no GPU is needed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mbm_kernels._core import dispatch, triton_launch
from mbm_kernels.bench import exits
from mbm_kernels.gate import cases, compare, resources

app = typer.Typer(
    help="Hold compiled kernels to what benchmarks/ records of them.", no_args_is_help=True
)


@app.callback()
def root() -> None:
    """Hold compiled kernels to what benchmarks/ records of them."""


@app.command(name="static", epilog=exits.LEGEND)
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
    folder: Annotated[
        Path, typer.Option("--folder", help="Of the baselines, <triton version>/<op>.json.")
    ] = Path("benchmarks/static"),
    cache: Annotated[
        Path | None,
        typer.Option("--cache", help="Of compilations; without it below MBM_CACHE."),
    ] = None,
) -> None:
    """Compile the Triton kernels for GPUs and compare registers, spills, ... with the baseline.

    Without --full: the configuration that each case runs with, float32 and bfloat16, sm_90 and
    gfx942. Anything new, worse or better fails until --update records it. The baseline is that of
    the triton installed.
    """
    code = exits.status(lambda: run(op or [], full, update, because, folder, cache))
    raise typer.Exit(code)


def run(
    asked: Sequence[str],
    full: bool,
    update: bool,
    because: str | None,
    folder: Path,
    cache: Path | None,
) -> int:
    versions = resources.versions()
    if triton_launch.interpreting():
        raise ValueError("gate: got TRITON_INTERPRET=1; expected the compiler; unset it")
    known = sorted({case.op for case in cases.CASES})
    for name in asked:
        dispatch.check_op(name)
        if name not in known:
            raise ValueError(
                f"gate: --op: got {name}, which has no Triton kernel; "
                f"expected one of {', '.join(known)}"
            )
    ops = list(asked) or known
    if not update:
        compare.check_baselines(folder, versions, ops)
    dtypes = tuple(compare.DTYPES) if full else compare.DEFAULT_DTYPES
    targets = tuple(resources.TARGETS) if full else compare.DEFAULT_TARGETS
    measured = compare.measure(ops, dtypes, targets, full, cache or resources.default_cache())
    failed = False
    for name, now in measured.items():
        path = compare.baseline_path(folder, versions, name)
        baseline = compare.read_baseline(path)
        before = {key: _metrics(entry) for key, entry in baseline["kernels"].items()}
        moves = compare.compare(before, now, whole=full)
        typer.echo(f"{name}: {len(now)} compilations, {len(moves)} moved")
        for move in moves:
            typer.echo(f"  {compare.describe(move)}")
        broken = any(move.verdict == "BROKEN" for move in moves)
        if update and not broken:
            compare.update(path, baseline, now, moves, versions, because)
        failed |= broken or (bool(moves) and not update)
    if failed:
        typer.echo("gate: resources moved; look at the table, then record them with --update")
    return exits.REGRESSION if failed else exits.OK


def _metrics(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "because"}
