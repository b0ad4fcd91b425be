"""Pages from templates/, self-contained: nothing is fetched when they are opened."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from PIL import Image


@cache
def environment() -> Environment:
    """Undefined names raise; what goes into HTML is escaped."""
    return Environment(
        loader=PackageLoader("mbm_kernels.captioning"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render(template: str, /, **context: Any) -> str:
    return environment().get_template(template).render(**context)


def stream(template: str, /, **context: Any) -> Iterator[str]:
    """`render` in pieces, so that an iterator in the context is used up as they are."""
    return environment().get_template(template).generate(**context)


def data_uri(picture: Image.Image, kind: str = "PNG") -> str:
    """A picture for `src`; kind: PNG or JPEG."""
    content = io.BytesIO()
    picture.save(content, format=kind, optimize=True, quality=85)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(content.getvalue()).decode()
