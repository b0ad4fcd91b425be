"""The command line: `mbm-kernels` and `python -m mbm_kernels`."""

import functools
import importlib
import json
import sys
import traceback
from typing import Annotated, Any

import typer

EXIT_BAD_INPUT = 2
EXIT_INTERNAL = 70  # never 1, which says that something measured is worse
EXIT_INTERRUPTED = 130

# What bad input raises. Anything else is a bug and keeps its traceback; --debug keeps them all.
BAD_INPUT = (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError)

# Typer carries click within itself since 0.26 and uses the package before; both derive from this.
ClickException: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    help="Fused kernels for multimodal models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Errors with their traceback.")] = False,
) -> None:
    """Fused kernels for multimodal models."""


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Versions, CPU ISA, threads, GPU, and which backends each operation has."""
    from mbm_kernels import info as report

    found = report.collect()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        report.print_report(found)


# The parts with dependencies of their own, in the order of --help: a group of commands, or one.
PARTS = {
    "caption": "mbm_kernels.demo.cli:app",
    "retrieve": "mbm_kernels.retrieval.cli:app",
    "drive": "mbm_kernels.driving.cli:app",
    "bench": "mbm_kernels.bench.cli:bench",
    "optimize": "mbm_kernels.optimize.cli:optimize",
    "explain": "mbm_kernels.optimize.cli:explain",
    "calibrate": "mbm_kernels.bench.calibrate_cli:calibrate",
    "gate": "mbm_kernels.gate.cli:app",
}


@functools.cache  # a part that is mounted twice is built twice at every call of the app
def _mount(name: str) -> None:
    module, _, attribute = PARTS[name].partition(":")
    part = getattr(importlib.import_module(module), attribute)
    if isinstance(part, typer.Typer):
        app.add_typer(part, name=name)
    else:
        app.command()(part)


def _mount_asked() -> None:
    """Parts are imported only when their command is named."""
    asked = next((word for word in sys.argv[1:] if word != "--debug"), "--help")
    for name in PARTS if asked == "--help" else {asked} & PARTS.keys():
        _mount(name)


def _in_one_line(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return f"got no more memory ({error}), expected enough; take fewer or smaller inputs"
    return " ".join(str(error).split()) or type(error).__name__


def main() -> None:
    """Runs the command line; bad input ends in one line on stderr, a bug in its traceback."""
    try:
        _mount_asked()
        code = app(standalone_mode=False)
    except ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BAD_INPUT as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {_in_one_line(error)}", file=sys.stderr)
        code = EXIT_BAD_INPUT
    except Exception:
        traceback.print_exc()
        code = EXIT_INTERNAL
    sys.exit(code or 0)
