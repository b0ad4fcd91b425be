"""A teacher's outputs on disk: the likeliest words of each place, and the features.

A folder holds ``cache.json``, which says of what teacher and data it is, and arrays that are mapped
into memory: ``ids.npy`` int32 [P, k] and ``log_probs.npy`` float32 [P, k] of the P predicted words
of all captions, ``features.npy`` float32 [N, S, D] of the N captions' images. It is written under
temporary names; ``cache.json`` comes last.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbm_kernels._core.files import write_atomic
from mbm_kernels.captioning.data import CaptionSet, WordTokenizer, collate
from mbm_kernels.captioning.lock import locked
from mbm_kernels.captioning.prior import NeighbourPrior
from mbm_kernels.captioning.taught import BATCH, Taught, checksum, place_of, starts_of
from mbm_kernels.models import Captioner

FACTS = "cache.json"
FORMAT = "mbm_kernels.teacher_cache"
ARRAYS = ("ids", "log_probs", "features")


class TeacherCache:
    """Top-k outputs of a teacher for a set of captioned images."""

    def __init__(self, folder: Path, lengths: Tensor) -> None:
        """`lengths`: predicted words of each caption, int64 [N]."""
        self.ids, self.log_probs, self.features = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS
        )
        self.lengths, self.starts = lengths, starts_of(lengths)

    @classmethod
    def open(
        cls,
        folder: Path,
        teacher: Captioner,
        captions: CaptionSet,
        tokenizer: WordTokenizer,
        *,
        k: int,
        prior: NeighbourPrior | None = None,
    ) -> TeacherCache:
        """The cache in a folder, computed first where there is none.

        Args:
            k: likeliest words that are kept of each place, at most the vocabulary.
            prior: added to the teacher's logits before its probabilities are taken.

        Raises:
            ValueError: an impossible k, or a folder with a cache of something else.
            RuntimeError: another process is writing it. OSError: it cannot be written.
        """
        if not 1 <= k <= teacher.vocab_size:
            raise ValueError(
                f"topk: got {k}, expected 1 to {teacher.vocab_size}, the words of the vocabulary"
            )
        facts = {
            "format": FORMAT,
            "version": 1,
            "teacher": checksum(teacher),
            "data": _data_checksum(captions, tokenizer),
            "k": k,
            "prior": prior is not None,
        }
        lengths = torch.tensor([len(tokenizer.encode(c)) - 1 for c in captions.captions])
        if not (folder / FACTS).is_file():
            with locked(folder, "teacher cache"):
                _write(folder, facts, teacher, captions, tokenizer, lengths, prior)
        _check(folder, facts)
        return cls(folder, lengths)

    def identity(self) -> dict[str, int]:
        return {"topk": self.ids.shape[1]}

    def batch(self, rows: Tensor) -> Taught:
        """The outputs for some captions; past a caption's end they are of some other word."""
        place, _ = place_of(rows, self.starts, self.lengths)
        ids = torch.from_numpy(self.ids[place.numpy()].astype(np.int64))
        log_probs = torch.from_numpy(self.log_probs[place.numpy()])
        return Taught(torch.from_numpy(self.features[rows.numpy()]), topk=(ids, log_probs))


@torch.no_grad()
def _write(
    folder: Path,
    facts: dict[str, Any],
    teacher: Captioner,
    captions: CaptionSet,
    tokenizer: WordTokenizer,
    lengths: Tensor,
    prior: NeighbourPrior | None,
) -> None:
    teacher.eval()
    device = next(teacher.parameters()).device
    words, k = int(lengths.sum()), facts["k"]
    features = (len(captions), len(teacher.encoder.positions), teacher.feature_size)
    shapes = {"ids": (words, k), "log_probs": (words, k), "features": features}
    partial = {name: folder / f"{name}.partial.npy" for name in ARRAYS}
    arrays = {
        name: np.lib.format.open_memmap(
            partial[name], "w+", dtype=np.int32 if name == "ids" else np.float32, shape=shape
        )
        for name, shape in shapes.items()
    }
    done = 0
    for start in range(0, len(captions), BATCH):
        rows = range(start, min(start + BATCH, len(captions)))
        images, tokens, length = collate(captions, rows, tokenizer)
        images, tokens = images.to(device), tokens.to(device)
        output = teacher(images, tokens[:, :-1])
        hidden, weight = output.hidden, teacher.head.weight
        if prior is not None:
            hidden, weight = prior.extend(hidden, weight, tokens, teacher.pad_id)
        predicted = torch.arange(tokens.shape[1] - 1) < (length - 1)[:, None]
        logits = torch.nn.functional.linear(hidden[predicted.to(device)], weight, teacher.head.bias)
        values, ids = logits.float().log_softmax(-1).topk(k, dim=-1)
        arrays["ids"][done : done + len(ids)] = ids.cpu().numpy()
        arrays["log_probs"][done : done + len(ids)] = values.cpu().numpy()
        arrays["features"][start : start + len(rows)] = output.features.cpu().numpy()
        done += len(ids)
    for name, array in arrays.items():
        array.flush()
        partial[name].replace(folder / f"{name}.npy")
    write_atomic(folder / FACTS, (json.dumps(facts, indent=1) + "\n").encode())


def _check(folder: Path, facts: dict[str, Any]) -> None:
    try:
        found = json.loads((folder / FACTS).read_bytes())
    except (ValueError, OSError) as error:
        raise ValueError(
            f"teacher cache {folder}: got a {FACTS} that is no JSON ({error}), expected one; "
            "give another folder"
        ) from error
    other = [n for n in facts if not isinstance(found, dict) or found.get(n) != facts[n]]
    if other:
        raise ValueError(
            f"teacher cache {folder}: got one of another {', '.join(other)}, expected one of this "
            "teacher, data and k; give another folder, and it is computed"
        )


def _data_checksum(captions: CaptionSet, tokenizer: WordTokenizer) -> str:
    digest = hashlib.sha256(tokenizer.to_bytes())
    digest.update(json.dumps([list(captions.images.shape), captions.captions]).encode())
    if captions.image_of is not None:
        digest.update(captions.image_of.numpy().tobytes())
    for start in range(0, len(captions.images), 1024):
        digest.update(captions.images[start : start + 1024].contiguous().numpy().tobytes())
    return digest.hexdigest()
