"""`mbm-kernels bench`, `python -m benchmarks` and each `benchmarks/bench_<op>.py`."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from mbm_kernels._core import env
from mbm_kernels._core.errors import BackendUnavailableError
from mbm_kernels.bench import harness, isa, machine, processes, results, table
from mbm_kernels.bench import model as predictions
from mbm_kernels.bench.benchmark import Benchmark, Case

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
    float | None,
    typer.Option("--seconds", min=0.05, help="Of sampling a row in a process; without it 2.5."),
]
NoCompile = Annotated[
    bool, typer.Option("--no-compile", help="Leave torch.compile out; into a file of its own.")
]
Publish = Annotated[
    bool,
    typer.Option(
        "--publish", help=f"Rows over {processes.LEAST} processes, 0.6 s in each: to be published."
    ),
]
Peers = Annotated[
    bool,
    typer.Option(
        "--peers",
        help="Inference engines too, those of '.[peers]' that are installed; rows forward.",
    ),
]
Processes = Annotated[
    int | None,
    typer.Option("--processes", min=1, help="That a row's times come from; without it 1."),
]
Force = Annotated[
    bool, typer.Option("--force", help="Also write rows whose times are in doubt, as AMBG.")
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
    files = _files(folder)
    if not files:
        raise ValueError(
            f"folder: got {folder}; expected bench_<op>.py files; run in a checkout of the project"
        )
    for op in ops or ():
        if op not in files:
            raise ValueError(f"op: got {op!r}; expected one of {', '.join(files)}; fix the name")
    return [_load_file(files[op]) for op in ops or files]


def _files(folder: Path) -> dict[str, Path]:
    return {p.stem.removeprefix("bench_"): p for p in sorted(folder.glob("bench_*.py"))}


def _load_file(path: Path) -> Benchmark:
    spec = importlib.util.spec_from_file_location(f"mbm_benchmarks.{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    found: Benchmark = module.BENCHMARK
    return found


@dataclass(frozen=True)
class Options:
    """What the command line asks for; `folder` has the bench_<op>.py files."""

    folder: Path
    quick: bool = False
    threads: list[int] | None = None
    heap: str | None = None
    case: str | None = None
    backend: str = "auto"
    seconds: float | None = None
    no_compile: bool = False
    publish: bool = False
    processes: int | None = None
    peers: bool = False
    force: bool = False
    readme: Path | None = None
    results_folder: Path | None = None

    def settings(self) -> harness.Settings:
        settings = harness.Settings(
            compile=not self.no_compile, backend=self.backend, quick=self.quick, peers=self.peers
        )
        if self.peers:
            isa.check_engines()
        if self.quick:
            settings = replace(settings, seconds=harness.QUICK_SECONDS, threads=(2,))
        if self.threads:
            settings = replace(settings, threads=tuple(self.threads))
        count = self.processes or (processes.LEAST if self.publish else 1)
        if self.publish and count < processes.LEAST:
            raise ValueError(
                f"processes: got {count}; expected at least {processes.LEAST} with --publish; "
                "leave one of the two out"
            )
        if count > 1:
            settings = harness.published(settings, count)
        return settings if self.seconds is None else replace(settings, seconds=self.seconds)

    def base(self) -> Path | None:
        """The folder of results; quick figures are not worth keeping unless someone says where."""
        unasked = self.quick and not os.environ.get("OUT")
        return self.results_folder or (None if unasked else self.folder / "results")


def again(mode: str) -> int:
    """Runs this very command in a process with that heap and ISA; its exit status."""
    command = [sys.executable, *sys.orig_argv[1:], "--heap", mode]
    return subprocess.run(command, env=machine.process_environment(mode), check=False).returncode


def measure(benchmarks: Sequence[Benchmark], options: Options) -> int:
    """Runs the benchmarks from this process: rows to the results file, a table to the terminal.

    Raises:
        ValueError: for no such case, or where a stock library computes in another ISA than ours.
    """
    settings, base = options.settings(), options.base()
    chosen = [(b, b.choose(options.case, settings.quick)) for b in benchmarks]
    chosen = [(b, cases) for b, cases in chosen if cases]
    if not chosen:
        labels = "; ".join(c.label for b in benchmarks for c in b.choose(None, settings.quick))
        raise ValueError(
            f"case: got {options.case!r}; expected part of one of: {labels}; fix the text"
        )
    console, rows = table.console_for_rows(), []
    commit, dirty = machine.commit(options.folder), machine.is_dirty(options.folder)
    file, unwritten = None, []
    with console.status("") as status:
        if base is not None or env.isa() is not None:
            status.update("asking every library for its ISA")
            found = isa.record()
            isa.check(found)
            if base is not None:
                local = results.is_local(dirty, settings.compile)
                file = results.ResultsFile(base, commit, local=local, isa=found)
        for benchmark, cases in chosen:
            for row in _rows(benchmark, cases, settings, options.folder, status.update):
                row = row | {"dirty": dirty}
                if reason := _unwritten(file, row, options.force):
                    unwritten.append(f"{_what(row)}: {reason}")
                rows.append(row)
                if not console.is_terminal:
                    print(_line(row), flush=True)
    table.print_rows(rows, console)
    wrong = [row["wrong"] for row in rows if "wrong" in row]
    for message in wrong:
        console.print(f"[red]wrong:[/red] {escape(message)}", soft_wrap=True, highlight=False)
    for message in unwritten:
        word = "in doubt" if file is None else "not written"
        said = f"[yellow]{word}:[/yellow] {escape(message)}"
        console.print(said, soft_wrap=True, highlight=False)
    if file is not None and len(unwritten) < len(rows):
        console.print(f"written: {file.path}", soft_wrap=True, highlight=False)
        if options.readme is not None and not settings.quick:
            table.update_readme(options.readme, results.read(file.path), file.path)
    return EXIT_WRONG if wrong else 0


def _rows(
    benchmark: Benchmark,
    cases: Sequence[Case],
    settings: harness.Settings,
    folder: Path,
    started: Callable[[str], None],
) -> Iterator[results.Row]:
    if settings.processes == 1:
        yield from harness.run(benchmark, cases, settings, started)
        return
    started(f"{benchmark.op}: starting {settings.processes} processes")
    with processes.Pool(folder, benchmark.op, settings.processes) as pool:
        yield from harness.run(benchmark, cases, settings, started, pool)


def _unwritten(file: results.ResultsFile | None, row: results.Row, force: bool) -> str | None:
    """Writes the row, or says why it should not be."""
    if row.get("doubts") and not force:
        return "; ".join(row["doubts"]) + (" (--force writes it as AMBG)" if file else "")
    return None if file is None else file.append(row)


def _what(row: results.Row) -> str:
    return f"{row['op']}, {row['case']}, {row['pass']}, {row['threads']} threads, {row['heap']}"


def _line(row: results.Row) -> str:
    if "wrong" in row:
        return f"{_what(row)}: WRONG"
    ratio = f"{row['ratio']:.2f}x {row['stock_form']} ({row['backend']})"
    return f"{_what(row)}: {row['verdict']} {ratio}"


def _run(benchmarks: Sequence[Benchmark], options: Options) -> int:
    wanted = options.heap or ("warm" if options.quick else "both")
    if wanted not in (*machine.HEAPS, "both"):
        raise ValueError(
            f"heap: got {options.heap!r}; expected default, warm or both; fix the name"
        )
    modes = machine.HEAPS if wanted == "both" else (wanted,)
    options.settings()  # raises before work, as the environments do
    environments = {mode: machine.process_environment(mode) for mode in modes}
    if tuple(environments) != (machine.heap(),) or not isa.is_held(env.isa()):
        return max(again(mode) for mode in modes)
    return measure(benchmarks, options)


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
    publish: Publish = False,
    processes: Processes = None,
    peers: Peers = False,
    force: Force = False,
    readme: Readme = None,
    results_folder: Results = None,
    model: Model = None,
) -> int:
    """Time operations against the fastest PyTorch baseline; exit status 1 if a result is wrong."""
    given = dict(locals())
    if model is not None:
        return _predict(load(folder, ops), model, case)
    return _run(load(folder, ops), _options(given))


def _options(given: dict[str, Any]) -> Options:
    return Options(**{f.name: given[f.name] for f in fields(Options)})


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
        publish: Publish = False,
        processes: Processes = None,
        peers: Peers = False,
        force: Force = False,
        readme: Readme = None,
        results_folder: Results = None,
    ) -> int:
        return _run([benchmark], _options({**locals(), "folder": folder}))

    script.__doc__ = f"Time {benchmark.op} against the best stock form."
    _main(script)


def run_all(folder: Path, readme: Path) -> None:
    """The main of `python -m benchmarks`: all operations; if published whole, `readme`'s table."""
    argv = sys.argv[1:]
    narrowed = "--case" in argv or any(op in argv for op in _files(folder))
    marked = readme.exists() and table.BEGIN in readme.read_text()
    if marked and "--publish" in argv and "--readme" not in argv and not narrowed:
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
