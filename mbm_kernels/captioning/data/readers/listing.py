"""What a reader finds: images by name with their captions, and what it skips and why."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

MOST_CHARACTERS = 2000  # of a caption: a batch is padded to its longest
MOST_SPLITS = 16
SUFFIXES = frozenset(
    ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "jp2", "avif")
)
# The names that data sets give to the three splits; restval is Karpathy's, trained on by custom.
SPLITS = {
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_SPLIT_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
_SPLIT_WORD = re.compile(rf"(?:^|[._-])({'|'.join(SPLITS)})(?:\d*)(?:$|[._-])")


@dataclass(frozen=True)
class Skip:
    """One thing that was left out: its kind ("image", "caption", ...), its name, the reason."""

    kind: str
    what: str
    why: str
    detail: str = ""


class Skipped:
    """Everything that was left out."""

    def __init__(self) -> None:
        self.rows: list[Skip] = []

    def add(self, kind: str, what: object, why: str, detail: object = "") -> None:
        self.rows.append(Skip(kind, _shown(what), why, _shown(detail)))

    def lines(self, examples: int = 3) -> list[str]:
        """One line a reason, the commonest first, with examples."""
        counts = Counter((row.kind, row.why) for row in self.rows)
        named: dict[tuple[str, str], list[Skip]] = {key: [] for key in counts}
        for row in self.rows:
            if len(named[row.kind, row.why]) < examples:
                named[row.kind, row.why].append(row)
        return [
            f"skipped {count} {kind}{'s' if count > 1 else ''}: {why} ("
            + ", ".join(
                row.what + (f": {row.detail}" if row.detail else "") for row in named[kind, why]
            )
            + (", ...)" if count > examples else ")")
            for (kind, why), count in counts.most_common()
        ]


@dataclass
class Entry:
    """An image with its captions.

    names: of files to look for below the images folder, in this order. Or shard and member: the
    file that holds the image among others, and its place there. `file` and `stamp` (bytes, time of
    change) are known once it is located.
    """

    name: str
    captions: list[str]
    split: str | None = None
    names: tuple[str, ...] = ()
    shard: Path | None = None
    member: int = 0
    file: Path | None = None
    stamp: tuple[int, int] = (0, 0)


@dataclass
class Listing:
    """The images that a reader found, by name.

    base: what names are relative to by default. splits_by_name: splits are told by names of files
    or folders, which count where there are two different ones at least.
    """

    format: str
    base: Path
    splits_by_name: bool = False
    entries: dict[str, Entry] = field(default_factory=dict)
    skipped: Skipped = field(default_factory=Skipped)

    def add(
        self,
        name: object,
        captions: Iterable[object],
        where: str,
        *,
        split: object = None,
        names: tuple[str, ...] = (),
        shard: Path | None = None,
        member: int = 0,
    ) -> None:
        """Take over an image, or more captions of one that is there; `where` names the source."""
        image = _name(name)
        if image is None:
            self.skipped.add("image", where, "its name is no text", name)
            return
        found = self.entries.get(image)
        if found is None:
            names = names if names or shard is not None else (image,)
            found = Entry(image, [], None, names, shard, member)
            self.entries[image] = found
        for caption in captions:
            text, why = clean(caption)
            if text is None:
                self.skipped.add("caption", f"{where}, {image}", why)
            else:
                found.captions.append(text)
        if split is not None and split != "":
            self._put_into(found, split, where)

    def _put_into(self, entry: Entry, split: object, where: str) -> None:
        given = split.strip().lower() if isinstance(split, str) else ""
        given = SPLITS.get(given, given)
        if not _SPLIT_NAME.fullmatch(given):
            self.skipped.add("split", f"{where}, {entry.name}", "its name is no word", split)
        elif entry.split is None:
            entry.split = given
        elif entry.split != given:
            detail = f"{entry.split} is kept, not {given}"
            self.skipped.add("split", entry.name, "the image is in two splits", detail)


def clean(caption: object) -> tuple[str | None, str]:
    """A caption in lower case with single spaces, or None and why it is none."""
    if not isinstance(caption, str):
        return None, "it is no text"
    if not is_text(caption):
        return None, "it is not UTF-8"
    text = unicodedata.normalize("NFC", " ".join(caption.split())).lower()
    if not any(c.isprintable() and c != " " for c in text):
        return None, "it is empty"
    if len(text) > MOST_CHARACTERS:
        return None, f"it has more than {MOST_CHARACTERS} characters"
    return text, ""


def is_text(text: str) -> bool:
    """Whether it has no lone surrogates, which stand for bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def split_in(stem: str) -> str | None:
    """The split that a file's name tells: "captions_val2017" is of val."""
    found = _SPLIT_WORD.search(stem.lower())
    return SPLITS[found[1]] if found else None


def read_text(path: Path) -> str:
    """A file's text: UTF-8, or UTF-16 with a byte order mark. Other bytes become surrogates.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"data {path}: got a file that cannot be read ({error.strerror}), expected one that "
            "can; look at its rights and its disk"
        ) from error
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        with suppress(UnicodeDecodeError):
            return content.decode("utf-16")
    return content.decode("utf-8", errors="surrogateescape").removeprefix("\ufeff")


def _name(name: object) -> str | None:
    if not isinstance(name, str) or not is_text(name):
        return None
    return name.strip() or None


def _shown(value: object) -> str:
    """In one line of bounded length, with what is no text replaced."""
    text = str(value).encode(errors="replace").decode()
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return text if len(text) <= 160 else f"{text[:157]}..."
