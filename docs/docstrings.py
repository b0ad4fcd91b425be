"""How griffe is to read this project's docstrings, which mkdocstrings renders."""

import re
from textwrap import dedent
from typing import Any

import griffe

CODE = re.compile(r"^(Equivalent to[^\n]*|Example):\n((?: {4}[^\n]*\n|\n)+)", re.M)
TEXT = re.compile(r"^(Numerics|Source):[ \n]+(?: {4})?", re.M)


class Docstrings(griffe.Extension):
    """Code under "Equivalent to:" and "Example:" stays code; "Numerics:" and "Source:" are text."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is None:
            return
        found = CODE.sub(_block, obj.docstring.value + "\n")
        obj.docstring.value = TEXT.sub(r"**\1**: ", found).rstrip()


def _block(found: re.Match[str]) -> str:
    code = dedent(found[2]).strip("\n")
    return f"**{found[1]}**\n\n```python\n{code}\n```\n\n"
