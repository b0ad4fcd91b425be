"""The instruction counts of another revision, for compilers without a recorded baseline."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from mbm_kernels.bench.exits import CannotMeasure
from tests.gates import planting

MAIN_BRANCHES = ("origin/HEAD", "origin/main", "origin/master", "main", "master")
SOURCES = ("csrc", "mbm_kernels", "setup.py", "tests/gates")  # what a count depends on
COUNT = (
    "import json, sys; from tests.gates import instructions;"
    "json.dump(instructions.count(), open(sys.argv[1], 'w'))"
)


def git(root: Path, *arguments: str) -> str | None:
    """What git prints, None where it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def revision(root: Path, asked: str | None) -> str:
    """The commit to compare with: the one asked for; HEAD where kernels are changed and not
    committed; where this branch left the main one; the commit before HEAD.

    Raises:
        ValueError: the one asked for is none.
        CannotMeasure: there is no other revision, as in a clone of depth 1.
    """
    if asked is not None:
        found = git(root, "rev-parse", "--verify", "--quiet", f"{asked}^{{commit}}")
        if not found:
            raise ValueError(f"gate: --base: got {asked!r}; expected a commit; fetch or fix it")
        return found
    head = git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    if head and git(root, "status", "--porcelain", "--untracked-files=no", "--", *SOURCES):
        return head
    for branch in MAIN_BRANCHES:
        found = git(root, "merge-base", "HEAD", branch)
        if found and found != head:
            return found
    if before := git(root, "rev-parse", "--verify", "--quiet", "HEAD^"):
        return before
    raise CannotMeasure(
        f"gate: {root}: got no revision to compare with; expected git and a commit before HEAD; "
        "fetch more of the history, or name one with --base"
    )


def count(root: Path, commit: str) -> dict[str, int]:
    """Compiles that revision in a folder of its own and counts its cases by its own gate."""
    with tempfile.TemporaryDirectory() as name:
        tree, counts = Path(name) / "tree", Path(name) / "counts.json"
        tree.mkdir()
        archive = subprocess.Popen(["git", "archive", commit], cwd=root, stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "-C", str(tree)], stdin=archive.stdout, check=True)
        if archive.wait() != 0:
            raise CannotMeasure(f"gate: git archive {commit} failed; fetch its files")
        try:
            planting.build(tree, "--inplace")
        except SystemExit as error:
            raise CannotMeasure(f"gate: {commit[:12]} does not compile: {error}") from None
        done = subprocess.run(
            [sys.executable, "-c", COUNT, str(counts)], cwd=tree, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise CannotMeasure(f"gate: {commit[:12]} cannot be counted: {done.stderr[-2000:]}")
        found: dict[str, int] = json.loads(counts.read_text())
        return found


def recorded_moves(root: Path, commit: str, folder: Path) -> set[str]:
    """Cases whose count any compiler's baseline records anew since that commit."""
    moved: set[str] = set()
    for path in folder.glob("*.json"):
        now = json.loads(path.read_text())
        text = git(root, "show", f"{commit}:{path.relative_to(root)}")
        before = json.loads(text) if text else {}
        moved |= {name for name, value in now.items() if before.get(name, value) != value}
    return moved
