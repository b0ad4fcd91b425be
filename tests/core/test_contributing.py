"""Follows CONTRIBUTING.md: the example op is written, compiled and tested in a copy of the tree."""

import re
import shutil
from pathlib import Path

import pytest

from tests import children

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
FILE = re.compile(r"^`([\w./]+)`:\n```\w+\n(.*?)^```$", re.M | re.S)
EDIT = re.compile(r"^In `([\w./]+)`, (after|before) `(.*?)`:\n```\w+\n(.*?)^```$", re.M | re.S)


def follow(folder: Path) -> list[str]:
    """Writes the text's files and edits into `folder`; returns the files' names."""
    for name, text in FILE.findall(TEXT):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name, where, anchor, text in EDIT.findall(TEXT):
        path = folder / name
        before = path.read_text()
        assert before.count(anchor) == 1, f"{name} has {anchor!r} {before.count(anchor)} times"
        new = f"{anchor}\n{text.rstrip()}" if where == "after" else f"{text}{anchor}"
        path.write_text(before.replace(anchor, new))
    return [name for name, _ in FILE.findall(TEXT)]


@pytest.mark.slow
def test_the_example_works(tmp_path):
    for name in ("mbm_kernels", "csrc", "tests/conftest.py", "tests/__init__.py", "setup.py",
                 "tests/ops/__init__.py", "tests/ops/test_drawn.py", "pyproject.toml", "README.md",
                 "LICENSE"):  # fmt: skip
        source, target = ROOT / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, target)
    # ninja compiles what differs from the objects of this checkout: commands and paths in them are
    # relative, and copies keep their times.
    for name in ("_C_cpu", "_C_cuda_emulated"):
        for objects in (ROOT / "build").glob(f"*{name}"):
            shutil.copytree(objects, tmp_path / "build" / objects.name)
    written = follow(tmp_path)
    assert len(written) == 11
    assert len(EDIT.findall(TEXT)) == 1, "its own files and one line"

    def run(*command: str) -> str:
        done = children.python(*command, cwd=tmp_path, MBM_CUDA="0", PYTHONPATH=str(tmp_path))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    run("setup.py", "-q", "build_ext", "--inplace")
    files = ("tests/ops/test_scale.py", "tests/ops/test_drawn.py")
    out = run("-m", "pytest", "-vv", "-p", "no:cacheprovider", *files, "-k", "scale")
    passed = re.findall(r"^tests/ops/(\w+)\.py::.* PASSED", out, re.M)
    assert passed.count("test_scale") >= 30
    assert passed.count("test_drawn") >= 3
    listing = run("-c", "import mbm_kernels; print(mbm_kernels.backends('scale'))")
    assert "'cpu': None" in listing
    run("-m", "ruff", "check", *(name for name in written if name.endswith(".py")))


def test_every_block_is_recognised():
    fences = TEXT.count("\n```python\n") + TEXT.count("\n```cpp\n") + TEXT.count("\n```text\n")
    assert len(FILE.findall(TEXT)) + len(EDIT.findall(TEXT)) == fences
