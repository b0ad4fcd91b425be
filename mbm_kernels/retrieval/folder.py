"""A folder of images as embeddings: what can be read is indexed, what cannot is counted."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mbm_kernels.captioning.checkpoint import Checkpoint
from mbm_kernels.captioning.pictures import read_picture
from mbm_kernels.models import TwoTower
from mbm_kernels.retrieval.embed import embed_pictures
from mbm_kernels.retrieval.index import Facts, Index

BATCH = 64

Progress = Callable[[str], None]


@dataclass
class Scan:
    """What a folder held: images read, why others were not, and how many files are no images."""

    read: int = 0
    bad: list[str] = field(default_factory=list)
    other: int = 0

    def __str__(self) -> str:
        found = f"{self.read} images"
        if self.bad:
            found += f", {len(self.bad)} that cannot be read"
        return found + (f", {self.other} other files" if self.other else "")


def index_folder(
    folder: Path, checkpoint: Checkpoint[TwoTower], run: Path, progress: Progress | None = None
) -> tuple[Index, Scan]:
    """The index of all images below a folder, in the order of their paths.

    Args:
        checkpoint: the model. run: where queries find it again.
        progress: called with one line for every image that cannot be read.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no image in it can be read, or the model gives no finite embedding.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"folder {folder}: got no such folder, expected one of images; give another"
        )
    scan, names, found = Scan(), [], []
    for batch in _batches(folder, checkpoint.model.image_size, scan, progress or (lambda _: None)):
        names += [name for name, _ in batch]
        found.append(embed_pictures(checkpoint.model, torch.stack([x for _, x in batch])))
    if not names:
        first = f" ({scan.bad[0]})" if scan.bad else ""
        raise ValueError(
            f"folder {folder}: got {scan}{first}, expected at least one image; give another"
        )
    embeddings = torch.cat(found)
    if not bool(torch.isfinite(embeddings).all()):
        raise ValueError(
            f"model {run}: got embeddings that are not finite, expected numbers; train it again"
        )
    facts = Facts(str(folder.resolve()), str(run.resolve()), identity_of(checkpoint))
    return Index(embeddings, names, facts), scan


def identity_of(checkpoint: Checkpoint[TwoTower]) -> dict[str, str]:
    """The checksums that tell a model and its words from all others."""
    sums = checkpoint.config["sha256"]
    return {name: str(sums.get(name)) for name in ("model.safetensors", "tokenizer.json")}


def check_same_model(index: Index, checkpoint: Checkpoint[TwoTower], path: Path) -> None:
    """
    Raises:
        ValueError: the index was made by another model.
    """
    if identity_of(checkpoint) != index.facts.identity:
        raise ValueError(
            f"index {path}: got the embeddings of another model than {checkpoint.path}, expected "
            "those of the same; give the model that it was made with to --model, or make the index "
            "again"
        )


def _batches(
    folder: Path, image_size: int, scan: Scan, say: Progress
) -> Iterator[list[tuple[str, Tensor]]]:
    """Names and uint8 images [3, Y, X]; `scan` counts."""
    batch: list[tuple[str, Tensor]] = []
    suffixes = set(Image.registered_extensions())
    for path in _files(folder, scan, say):
        if path.suffix.lower() not in suffixes:
            scan.other += 1
            continue
        try:
            picture = read_picture(path, image_size)
        except (ValueError, OSError) as error:
            _count(scan, " ".join(str(error).split()), say)
            continue
        scan.read += 1
        batch.append((str(path.relative_to(folder)), picture))
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _files(folder: Path, scan: Scan, say: Progress) -> Iterator[Path]:
    """Files below a folder in the order of their paths; links to folders are not followed."""

    def unreadable(error: OSError) -> None:
        _count(scan, f"folder {error.filename}: got {error.strerror}", say)

    for root, folders, files in os.walk(folder, onerror=unreadable):
        folders.sort()
        for name in sorted(files):
            yield Path(root, name)


def _count(scan: Scan, reason: str, say: Progress) -> None:
    scan.bad.append(reason)
    say(reason)
