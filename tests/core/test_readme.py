"""What the README says of the backends is so; tests/docs runs its examples."""

import re
from pathlib import Path

import mbm_kernels

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_table_of_backends_is_true():
    rows = re.findall(r"^\| \[`(\w+)`\]\(([^)]+)\) \| (yes|no) \| ([^|]+) \|", README, re.M)
    assert {op for op, *_ in rows} == set(mbm_kernels.ops.PUBLIC)
    for op, link, cpu, gpu in rows:
        assert (ROOT / link).is_file()
        folder = ROOT / "mbm_kernels" / "ops" / op
        assert (cpu == "yes") == (folder / "backend_cpu.py").exists(), op
        named = {"triton": "Triton", "cuda": "CUDA C++"}
        there = [word for n, word in named.items() if (folder / f"backend_{n}.py").exists()]
        assert gpu == ", ".join(there), op


def test_links_resolve():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
