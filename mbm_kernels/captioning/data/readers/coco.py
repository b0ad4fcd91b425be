"""COCO's `captions_*.json` and Karpathy's `dataset_*.json`."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .listing import Listing, read_text, split_in
from .tables import read_objects

Json = Any


def load_json(path: Path) -> Json:
    """The content of a JSON file.

    Raises:
        ValueError: it is not JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"data {path}: got a file that is not JSON ({error}), expected COCO's or Karpathy's "
            "captions or a list of objects; is it cut off? fetch or write it again"
        ) from error


def read_json(path: Path) -> Listing:
    """A JSON file, by what it holds.

    Raises:
        ValueError: it is none of the three kinds.
    """
    content = load_json(path)
    if isinstance(content, list):
        return read_objects(path, content)
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        if isinstance(content.get("annotations"), list):
            listing = Listing("COCO", path.parent)
            _add_coco(listing, content, path, None)
            return listing
        if any(isinstance(image, dict) and "sentences" in image for image in content["images"]):
            return _karpathy(content["images"], path)
    got = type(content).__name__
    if isinstance(content, dict):
        got = f"the keys {', '.join(sorted(content)[:8])}"
    raise ValueError(
        f"data {path}: got JSON with {got}, expected images and "
        "annotations (COCO), images with sentences (Karpathy), or a list of objects with image "
        "and caption"
    )


def read_coco_folder(folder: Path, files: Sequence[Path]) -> Listing:
    """Several COCO files, each of the split that its name tells."""
    listing = Listing("COCO", folder, splits_by_name=True)
    for path in files:
        content = load_json(path)
        keys = content if isinstance(content, dict) else {}
        if not all(isinstance(keys.get(key), list) for key in ("images", "annotations")):
            listing.skipped.add("file", path.name, "it holds no images and annotations")
            continue
        _add_coco(listing, content, path, split_in(path.stem))
    return listing


def _add_coco(listing: Listing, content: Json, path: Path, split: str | None) -> None:
    images: dict[str, str] = {}
    for number, image in enumerate(content["images"], 1):
        where = f"{path.name} image {number}"
        fields = image if isinstance(image, dict) else {}
        key, name = _id(fields.get("id")), fields.get("file_name")
        if key is None or not isinstance(name, str) or not name.strip():
            listing.skipped.add("image", where, "it has no id and file_name")
        elif key in images and images[key] != name:
            listing.skipped.add("image", name, "its id is another image's", f"{key}, {images[key]}")
        else:
            images[key] = name
    captions: dict[str, list[object]] = {key: [] for key in images}
    for number, note in enumerate(content["annotations"], 1):
        where = f"{path.name} annotation {number}"
        fields = note if isinstance(note, dict) else {}
        key = _id(fields.get("image_id"))
        if "caption" not in fields:
            listing.skipped.add("caption", where, "the annotation has no caption")
        elif key is None or key not in captions:
            why = "its image is not among the images"
            listing.skipped.add("caption", where, why, f"image_id {fields.get('image_id')!r}")
        else:
            captions[key].append(fields["caption"])
    # "captions_val2017.json" comes with images in "val2017".
    folder = path.stem.removeprefix("captions_")
    for key, name in images.items():
        names = (name, posixpath.join(folder, name.strip()))
        listing.add(name, captions[key], f"{path.name} image {key}", split=split, names=names)


def _karpathy(images: Sequence[Json], path: Path) -> Listing:
    listing = Listing("Karpathy", path.parent)
    for number, image in enumerate(images, 1):
        where = f"{path.name} image {number}"
        fields = image if isinstance(image, dict) else {}
        name, folder, sentences = (fields.get(k) for k in ("filename", "filepath", "sentences"))
        if not isinstance(name, str) or not isinstance(sentences, list):
            listing.skipped.add("image", where, "it has no filename and sentences")
            continue
        names: tuple[str, ...] = (name,)
        if isinstance(folder, str) and folder.strip():
            names = (posixpath.join(folder.strip(), name.strip()), name)
        captions = [_sentence(sentence) for sentence in sentences]
        listing.add(names[0], captions, where, split=fields.get("split"), names=names)
    return listing


def _sentence(sentence: Json) -> object:
    if not isinstance(sentence, dict):
        return sentence
    tokens = sentence.get("tokens")
    if "raw" not in sentence and isinstance(tokens, list):
        return " ".join(map(str, tokens))
    return sentence.get("raw")


def _id(value: object) -> str | None:
    """Ids are integers; some tools write them as text or as floats."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    return str(value).strip() or None
