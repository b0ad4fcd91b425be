"""Triton's interpreter without its most repeated work, for the tests that run under it."""

import functools
from typing import Any

from triton import language
from triton.runtime import interpreter


def patch_language_once() -> None:
    """A helper that a kernel calls finds the language patched, as it is at the kernel's launch.

    Triton 3.7's interpreter goes through every name of the language at each call of a helper, which
    is a third of a kernel's time, and changes nothing: what is patched is no builtin any more.
    """
    original = getattr(interpreter, "_patch_lang", None)
    if original is None or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def patch(function: Any) -> Any:
        seen = [v for v in function.__globals__.values() if v is language or v is language.core]
        if seen and not any(language.core.is_builtin(module.load) for module in seen):
            return interpreter._LangPatchScope()
        return original(function)

    interpreter._patch_lang = patch
