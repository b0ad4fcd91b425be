"""The emulated mma's fragments against CuTe, of the package nvidia-cutlass."""

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest

from tests.gates.planting import ROOT
from tests.gates.sanitizers import compiler


def includes() -> list[str]:
    """Of CuTe and of the CUDA runtime; skips where either is missing."""
    package = importlib.util.find_spec("cutlass_library")
    runtime = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    if package is None or package.origin is None or not runtime.exists():
        pytest.skip("needs CUDA's headers, and CuTe's: pip install nvidia-cutlass")
    cute = Path(package.origin).parent / "source" / "include"
    return [f"-I{path}" for path in (ROOT / "csrc", cute, runtime, runtime / "cccl")]


def test_fragments_lie_where_cute_says(tmp_path: Path) -> None:
    program = tmp_path / "mma_layout"
    source = ROOT / "tests" / "gates" / "mma_layout.cpp"
    command = [*compiler(), "-std=c++17", "-w", *includes(), str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    found = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    assert found == "0\n"
