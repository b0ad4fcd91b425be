"""Bugs planted into a copy of the tree.

A Mutant is a file, a text that occurs once in it and what replaces it. A text that is not found
ends the program with status 2: the kernel changed and the mutant must follow.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("mbm_kernels", "csrc", "tests", "setup.py", "pyproject.toml", "README.md", "LICENSE")
OBJECTS = f"build/{sysconfig.get_config_var('SOABI')}-_C_cpu"  # of a build in place


@dataclass(frozen=True)
class Mutant:
    name: str
    path: str
    old: str
    new: str
    caught_by: str  # tests, or a part of a sanitizer's report


def copy_tree(folder: Path, *more: str) -> None:
    """The sources, and build folders by name: objects are up to date in a copy as well."""
    for name in (*COPIED, *more):
        source = ROOT / name
        if source.is_dir():
            left_out = () if name in more else ("*.so", "__pycache__")
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns(*left_out))
        elif source.exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)


@contextmanager
def planted(mutant: Mutant, folder: Path) -> Iterator[None]:
    path = folder / mutant.path
    text = path.read_text()
    if text.count(mutant.old) != 1:
        print(f"{mutant.name}: its text occurs {text.count(mutant.old)} times in {mutant.path}")
        raise SystemExit(2)
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        yield
    finally:
        path.write_text(text)


def build(folder: Path, *options: str, **environment: str) -> None:
    """Compiles the extension of the tree in `folder`; in place unless options say where."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", *(options or ("--inplace",))],
        cwd=folder,
        env={**os.environ, "MBM_CUDA": "0", "MBM_LOWERED": "0", **environment},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(f"{folder}: does not compile:\n{done.stdout}{done.stderr}")
