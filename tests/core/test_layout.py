"""The habits of the tree, executable."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mbm_kernels
from mbm_kernels._core import dispatch, env
from mbm_kernels._core.op import OPS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mbm_kernels"
SOURCES = sorted(PACKAGE.rglob("*.py"))
CSRC = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh"))


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


# Operations that layers and models call, not users, and whose csrc folder has their kernels.
INTERNAL = {"gru_bidirectional": "gru", "linear_topk": "linear_topk"}


@pytest.mark.parametrize("op", sorted(OPS))
def test_op_is_complete(op):
    folder = ROOT.joinpath(*dispatch.package_of(op).split("."))
    for path in (
        *(folder / n for n in ("README.md", "reference.py", "op.py", "backend_torch.py")),
        ROOT / "tests" / "ops" / f"test_{op}.py",
        ROOT / "benchmarks" / f"bench_{op}.py",
    ):
        assert path.is_file(), f"{op} lacks {path.relative_to(ROOT)}"
    assert (op in mbm_kernels.__all__) == (op not in INTERNAL)
    native = folder / "backend_cpu.py"
    assert native.exists() == (ROOT / "csrc" / INTERNAL.get(op, op)).exists()


def test_backends_stand_alone():
    for path in PACKAGE.glob("ops/**/backend_*.py"):
        for name in imports(path):
            stem = name.split(".")[-1]
            assert not stem.startswith("backend_") or "_core" in name, f"{path}: {name}"
            assert stem != "reference", f"{path}: {name}"


def test_csrc_is_free_of_torch():
    for path in CSRC:
        text = path.read_text()
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", text), path
        if path.stem not in ("bind", "bind_cuda"):
            assert "pybind11" not in text, path


def test_files_are_read_in_one_sitting():
    long = {
        str(p.relative_to(ROOT)): n
        for p in (*SOURCES, *CSRC, *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py"))
        if (n := len(p.read_text().splitlines())) > 450
    }
    assert not long


def test_environment_is_read_in_one_place():
    readme = (ROOT / "README.md").read_text()
    for variable in env.VARIABLES:
        assert f"`{variable.name}`" in readme, f"README lacks {variable.name}"
    for path in SOURCES:
        if path != PACKAGE / "_core" / "env.py":
            assert not re.search(r"(environ|getenv).*MBM_", path.read_text()), path


def test_launch_tables_say_where_they_come_from():
    for path in PACKAGE.glob("ops/**/launch.json"):
        tables = json.loads(path.read_text())
        for name, entries in [*tables["kernels"].items(), *tables.get("choices", {}).items()]:
            assert entries, f"{path}: {name} has no configuration"
            assert not {"where", "dtypes"} & entries[-1].keys(), f"{path}: {name} may find none"
            for entry in entries:
                assert re.match(r"(measured on .+, \d{4}-\d\d-\d\d|estimated: .+)", entry["source"])


def test_import_is_light():
    """The operations need torch alone: no triton, no plotting, no tokenizers, no extension."""
    heavy = "triton torch._dynamo matplotlib tokenizers sacrebleu PIL typer mbm_kernels._C_cpu"
    code = (
        "import sys, torch; before = set(sys.modules); import mbm_kernels; "
        f"print([m for m in {heavy.split()} if m in set(sys.modules) - before])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_dispatch_rules_have_their_measurements():
    from mbm_kernels._core.dispatch import _tables

    for op, table in _tables.items():
        for rule in table.rules:
            path = ROOT / rule.results
            assert rule.backend in table.backends, op
            assert path.is_file(), f"{op}: {rule.results} is missing"
            assert rule.device == "cuda", f"{op}: CPUs go by predicted times"
