"""`python -m benchmarks`: all operations, into results/ and the table of RESULTS.md."""

from pathlib import Path

from mbm_kernels.bench.cli import run_all

FOLDER = Path(__file__).resolve().parent

run_all(FOLDER, FOLDER / "RESULTS.md")
