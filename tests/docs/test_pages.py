"""What docs/ and the README show runs, and what they say is so."""

import re
from pathlib import Path

import pytest
import torch

import mbm_kernels
from mbm_kernels._core.op import OPS
from tests.docs import models, support
from tests.docs.pages import DOCS

ROOT = DOCS.parent
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
# What a page's snippets take as given stands in a comment that no reader sees.
SNIPPET = re.compile(r"^(?:```python|<!-- setup)\n(.*?)^(?:```|-->)$", re.M | re.S)
MESSAGE = re.compile(r"^    (\S.*)$|^\| `([^`]+)` \|", re.M)
INCLUDE = re.compile(r"^<!-- include: (\S+?)(?: # (.+?))? -->$", re.M)
REFERENCE = re.compile(r"^::: ([\w.]+)$", re.M)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text()], ids=name)
def test_snippets_run(page):
    """In order, in one scope, as a reader would type them."""
    scope: dict = {"__name__": "snippets"}
    grad = torch.is_grad_enabled()
    try:
        for block in SNIPPET.findall(page.read_text()):
            exec(compile(block, name(page), "exec"), scope)
    finally:
        mbm_kernels.set_backend("auto")
    assert torch.is_grad_enabled() == grad


def test_support_matrix_is_current():
    """`python -m tests.docs.support` writes the page."""
    assert (DOCS / "support.md").read_text() == support.page()


def test_models_are_those_of_the_newest_results():
    """`python -m tests.docs.models` writes the page."""
    assert (DOCS / "models.md").read_text() == models.page()


def test_accuracy_has_every_operation():
    """Its figures are of one machine: `python -m tests.docs.accuracy` writes them."""
    listed = re.findall(r"^\| `(\w+)` \|", (DOCS / "accuracy.md").read_text(), re.M)
    assert set(listed) == set(OPS)


def test_every_public_name_is_documented():
    found = {path for page in PAGES for path in REFERENCE.findall(page.read_text())}
    documented = {path.rpartition(".")[2] for path in found}
    modules = {n for n, value in vars(mbm_kernels.nn).items() if isinstance(value, type)}
    names = (set(mbm_kernels.__all__) | modules) - {"nn", "onnx"}
    assert names <= documented
    for op in mbm_kernels.ops.PUBLIC:
        assert (DOCS / "ops" / f"{op}.md").is_file()


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"^ +- .+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert listed == {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")}


def test_links_resolve():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:\s]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{name(page)}: {link}"
        for path, heading in re.findall(
            r"^<!-- include: (\S+?)(?: # (.+?))? -->$", page.read_text()
        ):
            assert not heading or f"# {heading}\n" in (ROOT / path).read_text()


def test_messages_are_the_sources():
    """Every message of the troubleshooting page, piece by piece: sources put them together."""
    sources = [*(ROOT / "mbm_kernels").rglob("*.py"), ROOT / "setup.py"]
    text = "\n".join(path.read_text() for path in sources)
    # As the messages are: implicit concatenation undone, placeholders and escapes too.
    text = re.sub(r"\"\s*\n\s*f?\"", "", text)
    text = text.replace('\\"', '"')
    found = MESSAGE.findall((DOCS / "troubleshooting.md").read_text())
    assert len(found) > 25
    for line, cell in found:
        for piece in re.split(r"\.\.\.|; |\bgot |\bexpected ", line or cell):
            wanted = piece.strip(" :;,()'=")
            assert wanted in text, wanted
