"""What the README says of the backends is so; tests/docs runs its examples."""

import re
from pathlib import Path

import mbm_kernels

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_table_of_backends_is_true():
    rows = re.findall(r"^\| \[`(\w+)`\]\(([^)]+)\) \| (yes|no) \| (yes|no) \|", README, re.M)
    assert {op for op, *_ in rows} == set(mbm_kernels.ops.PUBLIC)
    for op, link, cpu, gpu in rows:
        assert (ROOT / link).is_file()
        folder = ROOT / "mbm_kernels" / "ops" / op
        assert (cpu == "yes") == (folder / "backend_cpu.py").exists(), op
        has_gpu = any((folder / f"backend_{name}.py").exists() for name in ("triton", "cuda"))
        assert (gpu == "yes") == has_gpu, op


def test_links_resolve():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
