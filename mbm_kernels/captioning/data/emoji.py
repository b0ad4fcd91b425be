"""Real drawings with human-written names: 3,786 emoji, each drawn by Google and by Twitter.

The images and names come from three npm packages, fetched by name at the user's request and kept
in a cache folder; this package holds none of them. Their licences, as read in version 16:

- `emoji-datasource-google`, `emoji-datasource-twitter` 16.0.0: code MIT (Cal Henderson); the
  drawings are Noto Emoji, Apache-2.0, and Twemoji, CC BY 4.0 (attribution: Twitter, Inc and other
  contributors).
- `emojibase-data` 16.0.3: MIT (Miles Johnson).

A caption is the English label in lower case: "waving hand: medium-light skin tone". Splits:
`train` are Google's drawings; `held_out` are Google's drawings of combinations never seen together,
such as a person with a skin tone, while each part is seen in another label; `unseen_style` are
Twitter's drawings of the labels in `train`.
"""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mbm_kernels._core import env
from mbm_kernels.captioning.pictures import on_white

from .base import CaptionSet
from .packages import Package, Progress, find_local, npm_pack, read

VENDORS = ("google", "twitter")
LABELS = Package("emojibase-data", "16.0.3", files=("en/data.json",))
DRAWINGS = {
    vendor: Package(f"emoji-datasource-{vendor}", "16.0.0", folder=f"img/{vendor}/64")
    for vendor in VENDORS
}
EXPECTED_IMAGES = 3786  # per vendor; every one has a label
SIDE = 64
HELD_OUT_SHARE = 0.2  # of the labels that combine a thing with a modifier, such as a skin tone
MANIFEST = "manifest.json"  # written last: a folder without it is incomplete

_VERSIONS = {p.name: p.version for p in (LABELS, *DRAWINGS.values())}
_CODE_POINTS = re.compile(r"[0-9A-F]{4,6}(-[0-9A-F]{4,6})*")
_REMEDY = "run `mbm-kernels caption prepare emoji`"


def default_cache_dir() -> Path:
    """`$MBM_CACHE`, else `mbm_kernels` in `$XDG_CACHE_HOME` or `~/.cache`."""
    return env.cache_dir()


def prepare(
    cache_dir: str | Path | None = None,
    from_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Make the data folder `<cache_dir>/emoji`, or return it if it is complete already.

    Args:
        cache_dir: None takes `default_cache_dir()`.
        from_dir: folder holding the three packages, as .tgz or extracted; None fetches them by npm
            (142 MB) into a temporary folder.
        progress: called with one line of text per step.

    Returns:
        The folder to pass to `load("emoji", root=...)`; it appears complete or not at all.

    Raises:
        RuntimeError: npm is missing or fails.
        ValueError: a package that is missing, damaged, hostile, of another version, or with another
            number of drawings than expected.
    """
    say = progress or (lambda _: None)
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    target = cache / "emoji"
    if _is_complete(target):
        say(f"emoji: {target} is complete")
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".emoji-") as scratch:
        build, downloads = Path(scratch) / "emoji", Path(scratch) / "npm"
        build.mkdir()
        downloads.mkdir()

        def source(package: Package) -> Path:
            if from_dir is not None:
                return find_local(package, Path(from_dir))
            say(f"emoji: npm pack {package.name}@{package.version}")
            return npm_pack(package, downloads)

        labels = _read_labels(source(LABELS))
        drawn = {}
        for vendor, package in DRAWINGS.items():
            drawn[vendor] = _copy_drawings(package, source(package), build / vendor)
            say(f"emoji: {len(drawn[vendor])} drawings by {vendor}")
        _check_join(drawn, labels)
        manifest = {
            "versions": _VERSIONS,
            "labels": {code: labels[code] for code in sorted(drawn[VENDORS[0]])},
        }
        text = json.dumps(manifest, ensure_ascii=False, indent=1)
        (build / MANIFEST).write_text(text, encoding="utf-8")
        os.sync()  # 7,573 files: one call, not one fsync each
        if target.exists():
            target.rename(Path(scratch) / "old")
        build.rename(target)
    say(f"emoji: {len(manifest['labels'])} labels, {target}")
    return target


def _is_complete(folder: Path) -> bool:
    """Whether prepare has nothing to do; a damaged folder or another version is made again."""
    try:
        names = {f"{code}.png" for code in _manifest_labels(folder)}
        versions = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("versions")
        held = [set(os.listdir(folder / vendor)) for vendor in VENDORS]
    except (ValueError, FileNotFoundError):
        return False
    return versions == _VERSIONS and all(names <= one for one in held)


def _without_fe0f(code_points: str) -> str:
    return "-".join(part for part in code_points.upper().split("-") if part != "FE0F")


def _read_labels(source: Path) -> dict[str, str]:
    """Code points without FE0F to lower-cased label, skin tones included."""
    labels: dict[str, str] = {}
    try:
        for _, content in read(LABELS, source):
            for entry in json.loads(content):
                for one in (entry, *entry.get("skins", ())):
                    labels[_without_fe0f(one["hexcode"])] = one["label"].lower()
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        labels = {}
    if not labels:
        raise ValueError(
            f"emoji: got no labels in {LABELS.files[0]} of {source}, expected entries with hexcode "
            f"and label; run `npm pack {LABELS.name}@{LABELS.version}`"
        )
    return labels


def _copy_drawings(package: Package, source: Path, target: Path) -> set[str]:
    target.mkdir()
    codes: set[str] = set()
    for path, content in read(package, source):
        code = _without_fe0f(path.rsplit("/", 1)[-1].removesuffix(".png"))
        if not _CODE_POINTS.fullmatch(code):
            raise ValueError(
                f"emoji: got {path!r} in {source}, expected a name of code points such as "
                "1f44b-1f3fb.png; fetch the package again"
            )
        _decode(content, f"{path} in {source}", SIDE)
        (target / f"{code}.png").write_bytes(content)
        codes.add(code)
    return codes


def _check_join(drawn: dict[str, set[str]], labels: dict[str, str]) -> None:
    first = drawn[VENDORS[0]]
    for vendor, codes in drawn.items():
        package = DRAWINGS[vendor]
        if len(codes) != EXPECTED_IMAGES:
            raise ValueError(
                f"emoji: got {len(codes)} drawings of {SIDE} px in {package.name}, expected "
                f"{EXPECTED_IMAGES}; run `npm pack {package.name}@{package.version}`"
            )
        stray = sorted((codes - labels.keys()) | (codes ^ first))
        if stray:
            raise ValueError(
                f"emoji: got {len(stray)} drawings by {vendor} without a label or a counterpart "
                f"({', '.join(stray[:5])}), expected none; use the pinned versions of the packages"
            )


def _decode(content: bytes, name: str, image_size: int) -> np.ndarray:
    """uint8 `[Y, X, 3]`, the drawing on white."""
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            size = image.size
            flat = on_white(image) if size == (SIDE, SIDE) else None
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"emoji: got a truncated or damaged picture, {name} ({error}), expected a PNG of "
            f"{SIDE} px; delete the folder and {_REMEDY}"
        ) from error
    if flat is None:
        raise ValueError(
            f"emoji: got a picture of {size[0]} x {size[1]}, {name}, expected {SIDE} x {SIDE}; "
            f"delete the folder and {_REMEDY}"
        )
    if image_size != SIDE:
        flat = flat.resize((image_size, image_size), Image.Resampling.LANCZOS)
    return np.asarray(flat)


def _manifest_labels(root: Path) -> dict[str, str]:
    path = root / MANIFEST
    if not path.is_file():
        state = "no such folder" if not root.is_dir() else "no manifest.json in it"
        raise ValueError(
            f"load: emoji: got {root} ({state}), expected the folder that prepare made; {_REMEDY}"
        )
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))["labels"]
        good = bool(labels) and all(
            _CODE_POINTS.fullmatch(code) and isinstance(label, str)
            for code, label in labels.items()
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise ValueError(
            f"load: emoji: got a damaged {path}, expected labels by code points; "
            f"delete the folder and {_REMEDY}"
        )
    return dict(labels)


def _read_drawings(root: Path, vendor: str, codes: Iterable[str], image_size: int) -> torch.Tensor:
    pictures = []
    for code in codes:
        path = root / vendor / f"{code}.png"
        try:
            content = path.read_bytes()
        except FileNotFoundError as error:
            raise ValueError(
                f"load: emoji: got no {path}, expected a drawing for each label of {MANIFEST}; "
                f"{_REMEDY}"
            ) from error
        pictures.append(_decode(content, str(path), image_size))
    if not pictures:
        return torch.zeros(0, 3, image_size, image_size, dtype=torch.uint8)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def parts(label: str) -> tuple[str, ...]:
    """What a label combines: "kiss: man, man, dark skin tone" is kiss, man, man, dark skin tone."""
    head, colon, modifiers = label.partition(": ")
    return (head, *modifiers.split(", ")) if colon else (label,)


def held_out_labels(labels: Iterable[str], seed: int = 0) -> set[str]:
    """A fifth of the labels with several parts, each part of which other labels still show."""
    distinct = sorted(set(labels))
    left = Counter(part for label in distinct for part in set(parts(label)))
    combined = [label for label in distinct if len(parts(label)) > 1]
    order = np.random.default_rng([seed, 0]).permutation(len(combined))
    chosen: set[str] = set()
    for index in order:
        needed = set(parts(combined[index]))
        if len(chosen) < HELD_OUT_SHARE * len(combined) and all(left[p] > 1 for p in needed):
            chosen.add(combined[index])
            left.subtract(needed)
    return chosen


def splits(
    *,
    seed: int = 0,
    root: str | Path | None = None,
    image_size: int = SIDE,
    limit: int | None = None,
) -> dict[str, CaptionSet]:
    """`train`, `held_out` and `unseen_style` in an order drawn by the seed; see `load`.

    With `limit`, `unseen_style` shows the labels of the limited `train`.
    """
    folder = Path(root) if root is not None else default_cache_dir() / "emoji"
    labels = _manifest_labels(folder)
    unseen = held_out_labels(labels.values(), seed)
    codes = sorted(labels)
    shuffled = [codes[i] for i in np.random.default_rng([seed, 1]).permutation(len(codes))]
    train = [code for code in shuffled if labels[code] not in unseen][:limit]
    held_out = [code for code in shuffled if labels[code] in unseen][:limit]
    plan = {
        "train": ("google", train),
        "held_out": ("google", held_out),
        "unseen_style": ("twitter", train),
    }
    return {
        split: CaptionSet(
            images=_read_drawings(folder, vendor, chosen, image_size),
            captions=[labels[code] for code in chosen],
            ids=[f"{vendor}/{code}" for code in chosen],
        )
        for split, (vendor, chosen) in plan.items()
    }
