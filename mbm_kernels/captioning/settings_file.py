"""Options of a command from a TOML file; what stands on the command line overrides it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import typer


def read(context: typer.Context, path: Path | None) -> Path | None:
    """A callback of an eager option: the file's values become the command's defaults.

    Keys are the options' names without the leading dashes, "-" or "_" within.

    Raises:
        ValueError: it is no TOML, or has a key that is no option or a value that is none of one.
        OSError: it cannot be read.
    """
    if path is None:
        return None
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no UTF-8 either
        raise ValueError(f"config {path}: got no TOML ({error}), expected one; mend it") from error
    except OSError as error:
        raise type(error)(
            f"config {path}: got no file that can be read ({error.strerror}), expected one; "
            "give another"
        ) from error
    names = _names(context)
    defaults = {}
    for key, value in found.items():
        name = names.get(key.replace("_", "-"))
        if name is None:
            known = ", ".join(sorted(names))
            raise ValueError(f"config {path}: got the key {key!r}, expected one of {known}")
        if not isinstance(value, str | int | float):
            raise ValueError(
                f"config {path}: got {key} = {value!r}, expected text, a number, true or false"
            )
        # As text, which an option checks as it does on the command line: 2.5 is no whole number.
        defaults[name] = str(value).lower() if isinstance(value, bool) else str(value)
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _names(context: typer.Context) -> dict[str, str]:
    """The command's parameters by the names of its options."""
    options: list[Any] = [x for x in context.command.params if x.param_type_name == "option"]
    return {
        flag.removeprefix("--"): option.name
        for option in options
        for flag in option.opts
        if flag.startswith("--") and option.name not in ("config", "help")
    }
