"""Captioned images: drawn by this package, out of packages, and the user's own."""

from . import emoji, own, scenes
from .base import CaptionSet, augment, collate, normalise, padded
from .load import NAMES, fetch, load, train_of
from .tokenizer import WordTokenizer

__all__ = [
    "NAMES",
    "CaptionSet",
    "WordTokenizer",
    "augment",
    "collate",
    "emoji",
    "fetch",
    "load",
    "normalise",
    "own",
    "padded",
    "scenes",
    "train_of",
]
