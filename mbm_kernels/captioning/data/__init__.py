"""Captioned images: `scenes`, drawn by this package, `emoji`, real drawings, and one's own."""

from . import emoji, own, scenes
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
    "own",
    "scenes",
]
