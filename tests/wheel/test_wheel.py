"""The wheel and the sdist that `make test-wheel` has made, installed where nothing else is."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DIST = os.environ.get("DIST")
MOST_MB, LARGEST_SOURCE = 10, 1 << 20

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DIST is None, reason="make test-wheel builds what this tests"),
]


def newest(pattern: str) -> Path:
    return max((ROOT / str(DIST)).glob(pattern), key=lambda path: path.stat().st_mtime)


def run(*command: str | Path, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def packaged(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as content:
        return {name for name in content.namelist() if name.startswith("mbm_kernels/")}


def committed(folder: str) -> set[str]:
    """What is in git, but for the notes of who made it."""
    names = run("git", "ls-files", folder, cwd=ROOT).split()
    return {name for name in names if not name.endswith("NOTES.md")}


def test_wheel_holds_the_package_and_its_cpu_kernels():
    wheel = newest("*.whl")
    names = packaged(wheel)
    compiled = {name for name in names if name.endswith(".so")}
    assert committed("mbm_kernels") <= names
    assert [name.split(".")[0] for name in compiled] == ["mbm_kernels/_C_cpu"]
    size = wheel.stat().st_size / 1e6
    print(f"{wheel.name}: {size:.1f} MB")
    assert size < MOST_MB


def test_wheel_runs_without_a_compiler(tmp_path):
    """In a venv that sees torch through a .pth, with an empty PATH."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    install = ("-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index")
    run(sys.executable, *install, newest("*.whl"), cwd=tmp_path, env=environment)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
    calls = ROOT / "tests" / "wheel" / "calls.py"
    said = run(python, calls, cwd=tmp_path, env={**environment, "PATH": str(tmp_path)})
    print(said)
    assert str(site) in said, "another installation was imported"


def test_sdist_holds_what_a_build_needs(tmp_path):
    sdist = newest("*.tar.gz")
    with tarfile.open(sdist) as content:
        members = {m.name.partition("/")[2]: m.size for m in content.getmembers() if m.isfile()}
        content.extractall(tmp_path, filter="data")
    assert committed("csrc") | committed("mbm_kernels") <= set(members)
    assert not [name for name in members if name.startswith(("benchmarks/", "tests/"))]
    large = {name: size for name, size in members.items() if size > LARGEST_SOURCE}
    assert not large
    print(f"{sdist.name}: {len(members)} files, {sdist.stat().st_size / 1e6:.1f} MB")

    (folder,) = tmp_path.iterdir()
    # What was compiled for this checkout serves a copy of it.
    for objects in (ROOT / "build").glob("*_C_cpu"):
        shutil.copytree(objects, folder / "build" / objects.name)
    build = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "made", ".")
    run(sys.executable, *build, cwd=folder, env={**os.environ, "MBM_CUDA": "0"})
    (made,) = (folder / "made").glob("*.whl")
    assert packaged(made) == packaged(newest("*.whl"))
