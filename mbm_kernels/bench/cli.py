"""`mbm-kernels bench`, `python -m benchmarks` and each `benchmarks/bench_<op>.py`."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from mbm_kernels._core.errors import BackendUnavailableError
from mbm_kernels.bench import harness, machine, results, table
from mbm_kernels.bench import model as predictions
from mbm_kernels.bench.benchmark import Benchmark

EXIT_WRONG, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130

# Typer carries click within itself since 0.26 and uses the package before; both derive from this.
ClickException: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

Quick = Annotated[
    bool,
    typer.Option(
        "--quick", help="Few small cases, 0.5 s a row, nothing written without --results."
    ),
]
Threads = Annotated[
    list[int] | None, typer.Option("--threads", min=1, help="Repeatable; without it 2 and 1.")
]
Heap = Annotated[
    str | None,
    typer.Option("--heap", help="default, warm or both; without it both, with --quick warm."),
]
CaseName = Annotated[str | None, typer.Option("--case", help="Cases whose label holds this text.")]
Backend = Annotated[
    str, typer.Option("--backend", help="Of the operation; a named one also where auto says torch.")
]
Seconds = Annotated[
    float | None, typer.Option("--seconds", min=0.05, help="Of sampling a row; without it 2.5.")
]
NoCompile = Annotated[
    bool, typer.Option("--no-compile", help="Leave torch.compile out: no ratio to publish.")
]
Readme = Annotated[
    Path | None, typer.Option("--readme", help="Put the table between this file's markers.")
]
Results = Annotated[
    Path | None, typer.Option("--results", help="Folder of results; OUT in the environment wins.")
]
Ops = Annotated[list[str] | None, typer.Argument(help="Operations; without one, all.")]
Model = Annotated[
    str | None,
    typer.Option("--model", help="Time nothing: print least times predicted for a GPU (h100)."),
]
Folder = Annotated[Path, typer.Option("--folder", help="Where the bench_<op>.py files are.")]


def load(folder: Path, ops: Sequence[str] | None = None) -> list[Benchmark]:
    """The BENCHMARK of each bench_<op>.py in `folder`.

    Raises:
        ValueError: when there is none, or an unknown operation is asked for.
    """
    files = {p.stem.removeprefix("bench_"): p for p in sorted(folder.glob("bench_*.py"))}
    if not files:
        raise ValueError(
            f"folder: got {folder}; expected bench_<op>.py files; run in a checkout of the project"
        )
    for op in ops or ():
        if op not in files:
            raise ValueError(f"op: got {op!r}; expected one of {', '.join(files)}; fix the name")
    return [_load_file(files[op]) for op in ops or files]


def _load_file(path: Path) -> Benchmark:
    spec = importlib.util.spec_from_file_location(f"mbm_benchmarks.{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    found: Benchmark = module.BENCHMARK
    return found


def in_heap(mode: str) -> int:
    """Runs this very command again in a process with that heap; its exit status."""
    command = [sys.executable, *sys.orig_argv[1:], "--heap", mode]
    return subprocess.run(command, env=machine.heap_environment(mode), check=False).returncode


def measure(
    benchmarks: Sequence[Benchmark],
    settings: harness.Settings,
    *,
    root: Path,
    base: Path | None,
    case: str | None = None,
    readme: Path | None = None,
) -> int:
    """Runs the benchmarks in this process: rows to the results file, a table to the terminal.

    Args:
        root: a folder of the checkout, for the commit.
        base: the folder of results, None to write none.
    """
    chosen = [(b, b.choose(case, settings.quick)) for b in benchmarks]
    if not any(cases for _, cases in chosen):
        labels = "; ".join(c.label for b in benchmarks for c in b.choose(None, settings.quick))
        raise ValueError(f"case: got {case!r}; expected part of one of: {labels}; fix the text")
    console, rows = table.console_for_rows(), []
    commit, dirty = machine.commit(root), machine.is_dirty(root)
    file = None if base is None else results.ResultsFile(base, commit)
    with console.status("") as status:
        for benchmark, cases in chosen:
            for row in harness.run(benchmark, cases, settings, started=status.update):
                row = row | {"dirty": dirty}
                if file is not None:
                    file.append(row)
                rows.append(row)
                if not console.is_terminal:
                    print(_line(row), flush=True)
    table.print_rows(rows, console)
    wrong = [row["wrong"] for row in rows if "wrong" in row]
    for message in wrong:
        console.print(f"[red]wrong:[/red] {escape(message)}", soft_wrap=True, highlight=False)
    if file is not None:
        console.print(f"written: {file.path}", soft_wrap=True, highlight=False)
        if readme is not None and not settings.quick:
            table.update_readme(readme, results.read(file.path), file.path)
    return EXIT_WRONG if wrong else 0


def _line(row: results.Row) -> str:
    what = f"{row['op']}, {row['case']}, {row['pass']}, {row['threads']} threads, {row['heap']}"
    if "wrong" in row:
        return f"{what}: WRONG"
    return f"{what}: {row['ratio']:.2f}x {row['stock_form']} ({row['backend']})"


def _run(
    benchmarks: Sequence[Benchmark],
    folder: Path,
    quick: bool,
    threads: list[int] | None,
    heap: str | None,
    case: str | None,
    backend: str,
    seconds: float | None,
    no_compile: bool,
    readme: Path | None,
    results_folder: Path | None,
) -> int:
    wanted = heap or ("warm" if quick else "both")
    if wanted not in (*machine.HEAPS, "both"):
        raise ValueError(f"heap: got {heap!r}; expected default, warm or both; fix the name")
    modes = machine.HEAPS if wanted == "both" else (wanted,)
    environments = {mode: machine.heap_environment(mode) for mode in modes}  # raises before work
    if tuple(environments) != (machine.heap(),):
        return max(in_heap(mode) for mode in modes)
    settings = harness.Settings(compile=not no_compile, backend=backend, quick=quick)
    if quick:
        settings = replace(settings, seconds=harness.QUICK_SECONDS)
    if threads:
        settings = replace(settings, threads=tuple(threads))
    elif quick:
        settings = replace(settings, threads=(2,))
    if seconds is not None:
        settings = replace(settings, seconds=seconds)
    # Quick figures are not worth keeping unless someone says where.
    unasked = quick and not os.environ.get("OUT")
    base = results_folder or (None if unasked else folder / "results")
    return measure(benchmarks, settings, root=folder, base=base, case=case, readme=readme)


def _predict(benchmarks: Sequence[Benchmark], name: str, case: str | None) -> int:
    if name not in predictions.MODELS:
        known = ", ".join(predictions.MODELS)
        raise ValueError(f"model: got {name!r}; expected one of {known}; fix the name")
    model = predictions.MODELS[name]
    rows = predictions.predict(benchmarks, model, case, ("bfloat16", "float32"))
    predictions.print_table(rows, model)
    return 0


def bench(
    ops: Ops = None,
    folder: Folder = Path("benchmarks"),
    quick: Quick = False,
    threads: Threads = None,
    heap: Heap = None,
    case: CaseName = None,
    backend: Backend = "auto",
    seconds: Seconds = None,
    no_compile: NoCompile = False,
    readme: Readme = None,
    results_folder: Results = None,
    model: Model = None,
) -> int:
    """Time the operations against the best stock form; exit status 1 when a result is wrong."""
    if model is not None:
        return _predict(load(folder, ops), model, case)
    return _run(
        load(folder, ops),
        folder,
        quick,
        threads,
        heap,
        case,
        backend,
        seconds,
        no_compile,
        readme,
        results_folder,
    )


def run_script(benchmark: Benchmark, folder: Path) -> None:
    """The main of a bench_<op>.py: the same options without the operation."""

    def script(
        quick: Quick = False,
        threads: Threads = None,
        heap: Heap = None,
        case: CaseName = None,
        backend: Backend = "auto",
        seconds: Seconds = None,
        no_compile: NoCompile = False,
        readme: Readme = None,
        results_folder: Results = None,
    ) -> int:
        return _run(
            [benchmark],
            folder,
            quick,
            threads,
            heap,
            case,
            backend,
            seconds,
            no_compile,
            readme,
            results_folder,
        )

    script.__doc__ = f"Time {benchmark.op} against the best stock form."
    _main(script)


def run_all(folder: Path, readme: Path) -> None:
    """The main of `python -m benchmarks`: all operations, and the README's table."""
    argv = sys.argv[1:]
    marked = readme.exists() and table.BEGIN in readme.read_text()
    if marked and "--readme" not in argv:
        argv = ["--readme", str(readme), *argv]
    if "--folder" not in argv:
        argv = ["--folder", str(folder), *argv]
    _main(bench, argv)


def _main(command: Callable[..., int], argv: list[str] | None = None) -> None:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    try:
        code = app(argv, standalone_mode=False)
        if code == EXIT_INTERRUPTED:  # Typer's own answer to Ctrl-C, without a word
            print("interrupted", file=sys.stderr)
    except ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except (ValueError, OSError, BackendUnavailableError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_BAD_INPUT
    sys.exit(code or 0)
