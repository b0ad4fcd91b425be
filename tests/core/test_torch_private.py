"""The private names of torch stand in one module, and operations are right without them."""

import ast
from pathlib import Path

from mbm_kernels._core import torch_private
from mbm_kernels._core.op import OPS
from tests import children

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mbm_kernels"
MODULE = PACKAGE / "_core" / "torch_private.py"
# What runs beside the package, in its pinned environment: benchmarks, gates and tests.
TOOLS = ("bench", "engines", "gate", "testing")
OTHERS = {"_replace", "_data"}  # of a named tuple, of os.environ


def sources():
    return [
        p for p in sorted(PACKAGE.rglob("*.py")) if p.relative_to(PACKAGE).parts[0] not in TOOLS
    ]


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def is_name(node, *names):
    return isinstance(node, ast.Name) and node.id in names


def defined(trees):
    """Every name that the package itself gives to something."""
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield node.name
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                yield node.attr
            elif isinstance(node, ast.Assign) and is_name(node.targets[0], "__slots__"):
                yield from (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))


def used(tree):
    """Private attributes, and private modules and names of torch that are imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr
        elif isinstance(node, ast.Call) and is_name(node.func, "getattr", "hasattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(name.value):
                yield name.value
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            yield from filter(is_private, names)
        elif isinstance(node, ast.Import):
            parts = (alias.name.split(".") for alias in node.names)
            yield from (p for path in parts if path[0] == "torch" for p in path if is_private(p))


def test_private_names_are_in_one_module():
    trees = {path: ast.parse(path.read_text()) for path in sources()}
    own = set(defined(trees)) - set(torch_private.INHERITED)
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path, tree in trees.items()
        if path != MODULE
        for name in set(used(tree)) - own - OTHERS - set(torch_private.INHERITED)
    }
    # Variables of torch, read through the modules that torch_private stands in for.
    allowed = ("_is_profiler_enabled", "_current_level")
    assert not {line for line in found if not line.endswith(allowed)}


def test_inherited_names_are_used():
    text = "\n".join(path.read_text() for path in sources() if path != MODULE)
    assert not [name for name in torch_private.INHERITED if name not in text]


STANDING_IN = """
import sys, types
import torch

path, name = {path!r}, "mbm_kernels._core.torch_private"
found = "return otherwise if found is None else found"
text = open(path).read()
assert text.count(found) == 1
module = sys.modules[name] = types.ModuleType(name)
exec(compile(text.replace(found, "return otherwise"), path, "exec"), vars(module))
sys.path.insert(0, {calls!r})
import calls
assert module.dispatch_modes() == 1 and module.base is module._none
calls.main()
"""


def test_operations_run_with_every_stand_in():
    """As if torch had none of the names: what the wheel's test calls."""
    code = STANDING_IN.format(path=str(MODULE), calls=str(ROOT / "tests" / "wheel"))
    done = children.python("-c", code)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{len(OPS)} operations" in done.stdout
