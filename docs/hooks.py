"""What mkdocs does to a page before it renders it.

A line `<!-- include: PATH -->` is replaced by that file of the repository without its title,
`<!-- include: PATH # HEADING -->` by the section under that heading.
A link that leaves docs/ becomes the name of the file it pointed to, or a link to it if mkdocs.yml
has a repo_url.
"""

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
INCLUDE = re.compile(r"^<!-- include: (\S+?)(?: # (.+?))? -->$", re.M)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    source = DOCS / page.file.src_uri
    text = _outside(markdown, source, source, config.repo_url)
    return INCLUDE.sub(lambda found: _included(*found.groups(), source, config.repo_url), text)


def _included(path: str, heading: str | None, page: Path, repo_url: str | None) -> str:
    file = ROOT / path
    text = re.sub(r"\A# .*\n", "", file.read_text())
    if heading is not None:
        text = section(text, heading)
    return _outside(text, file, page, repo_url)


def section(text: str, heading: str) -> str:
    """What stands under a heading, to the next one of its level; its own headings a level higher.

    Raises:
        ValueError: there is no such heading.
    """
    lines, inside, level, fenced = [], False, 0, False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        marks = 0 if fenced else len(line) - len(line.lstrip("#"))
        if inside and 0 < marks <= level:
            break
        if inside:
            lines.append(line[1:] if marks else line)
        elif marks and line[marks:].strip() == heading:
            inside, level = True, marks
    if not inside:
        raise ValueError(f"include: got the heading {heading!r}; expected one of the file's own")
    return "\n".join(lines)


def _outside(text: str, file: Path, page: Path, repo_url: str | None) -> str:
    """`text` of `file` as it stands in `page`, of which mkdocs knows what lies in docs/."""

    def link(found: re.Match[str]) -> str:
        label, target, anchor = found[1], found[2], found[3] or ""
        path = Path(os.path.normpath(file.parent / target))
        if not path.exists():
            return found[0]
        if path.is_relative_to(DOCS):
            return f"[{label}]({os.path.relpath(path, page.parent)}{anchor})"
        name = path.relative_to(ROOT).as_posix()
        if repo_url:
            return f"[{label}]({repo_url.rstrip('/')}/blob/main/{name}{anchor})"
        return f"`{name}`" if label.strip("`") in name else f"{label} (`{name}`)"

    return LINK.sub(link, text)
