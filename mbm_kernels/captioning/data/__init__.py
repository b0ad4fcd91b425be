"""Captioned images: `scenes`, drawn by this package, and `emoji`, real drawings."""

from . import emoji, scenes
from .base import CaptionSet, augment, collate, normalise
from .load import NAMES, load
from .tokenizer import WordTokenizer

__all__ = [
    "NAMES",
    "CaptionSet",
    "WordTokenizer",
    "augment",
    "collate",
    "emoji",
    "load",
    "normalise",
    "scenes",
]
