"""`python -m benchmarks`: all operations, into results/ and the README's table."""

from pathlib import Path

from mbm_kernels.bench.cli import run_all

FOLDER = Path(__file__).resolve().parent

run_all(FOLDER, FOLDER.parent / "README.md")
