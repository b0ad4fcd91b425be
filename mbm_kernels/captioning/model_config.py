"""A captioner's configuration from a file."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

from mbm_kernels.models import CaptionerConfig

MOST_BYTES = 1 << 20


def read_config(path: Path, image_size: int | None, default_size: int) -> CaptionerConfig:
    """Fields of `CaptionerConfig` in TOML, or in JSON in a file of that suffix.

    Args:
        image_size: in place of the file's, if given. default_size: where neither gives one.

    Raises:
        ValueError: it is no such file, or describes no captioner. FileNotFoundError: there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"model config {path}: got no such file, expected TOML or JSON")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"model config {path}: got more than {MOST_BYTES} bytes, expected a few")
    content = path.read_bytes()
    try:
        text = content.decode()
        values = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
        if not isinstance(values, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"model config {path}: got no file of its kind ({error}), expected fields of "
            "CaptionerConfig in TOML, or in JSON by its suffix"
        ) from error
    if image_size is not None:
        values["image_size"] = image_size
    values.setdefault("image_size", default_size)
    try:
        return CaptionerConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"model config {path}: {error}") from error
