"""The emulated mma's fragments against CuTe, of the package nvidia-cutlass."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

from mbm_kernels.gate import cuda
from tests.gates.planting import ROOT
from tests.gates.sanitizers import compiler


def includes() -> list[str]:
    """Of CuTe and of the CUDA runtime; skips where either is missing."""
    package = importlib.util.find_spec("cutlass_library")
    nvcc = cuda.nvcc()
    if package is None or package.origin is None or nvcc is None:
        pytest.skip("needs nvcc and CuTe's headers: pip install nvidia-cutlass")
    runtime = Path(nvcc).resolve().parents[1] / "include"
    cute = Path(package.origin).parent / "source" / "include"
    return [f"-I{path}" for path in (ROOT / "csrc", cute, runtime, runtime / "cccl")]


def test_fragments_lie_where_cute_says(tmp_path: Path) -> None:
    program = tmp_path / "mma_layout"
    source = ROOT / "tests" / "gates" / "mma_layout.cpp"
    command = [*compiler(), "-std=c++17", "-w", *includes(), str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    found = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    assert found == "0\n"
