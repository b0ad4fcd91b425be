"""An index: the embeddings of a folder's images, the model that made them, and exact search.

The file is safetensors: `embeddings` float32 [N, D], `names` uint8, the images' paths below the
folder as a JSON list, and among the metadata the `facts` and the checksum of all three.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from mbm_kernels._core.files import write_atomic

FORMAT = "mbm_kernels.index"
VERSION = "1"
BLOCK = 1 << 14  # rows multiplied at a time: 8 MB of 128 dimensions, and their scores stay in cache


@dataclass(frozen=True)
class Facts:
    """Absolute paths of the folder and the model's run, and the checksums of the model's files."""

    folder: str
    model: str
    identity: dict[str, str]


@dataclass(frozen=True)
class Index:
    """embeddings float32 [N, D], rows of length 1; the N images' names, relative to the folder."""

    embeddings: Tensor
    names: list[str]
    facts: Facts

    def __len__(self) -> int:
        return len(self.names)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest of all rows, by cosine.

        Exact: a product with blocks of rows, or faiss's IndexFlatIP where faiss is installed. Of
        rows that are equally near, the first comes first, but any may be the last that is taken.

        Args:
            queries: float32 [Q, D], rows of length 1.
            k: at least 1; at most N are found.

        Returns:
            similarities float32 [Q, k] in falling order, and rows int64 [Q, k].

        Raises:
            ValueError: for queries of another dimension, or an impossible k.
        """
        count, size = self.embeddings.shape
        if queries.dim() != 2 or queries.shape[1] != size:
            raise ValueError(
                f"queries: got shape {list(queries.shape)}, expected [Q, {size}]; embed them with "
                "the model of the index"
            )
        if k < 1:
            raise ValueError(f"top: got {k}, expected at least 1; the default is 5")
        by = _by_faiss if find_spec("faiss") is not None else _by_blocks
        return by(self.embeddings, queries, min(k, count))

    def save(self, path: Path) -> None:
        """Write the index; what was there before stays until it is whole.

        Raises:
            OSError: if it cannot be written.
        """
        names = torch.frombuffer(bytearray(json.dumps(self.names).encode()), dtype=torch.uint8)
        tensors = {"embeddings": self.embeddings.contiguous(), "names": names}
        facts = json.dumps(asdict(self.facts), sort_keys=True)
        metadata = {"format": FORMAT, "version": VERSION, "facts": facts}
        metadata["sha256"] = _checksum(tensors, facts)
        try:
            write_atomic(path, save_tensors(tensors, metadata))
        except OSError as error:
            raise type(error)(
                f"index {path}: got a path that cannot be written ({error.strerror or error}), "
                "expected one that can; give another to --out"
            ) from error


def load(path: Path) -> Index:
    """What `Index.save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no index, a damaged one, or one of another version.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"index {path}: got no such file, expected an index; make one with "
            "`mbm-kernels retrieve index`"
        )
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            kind = metadata.get("format"), metadata.get("version")
            if kind != (FORMAT, VERSION):
                raise _bad(path, f"a file of format {kind[0]!r} version {kind[1]!r}")
            if sorted(file.keys()) != ["embeddings", "names"]:
                raise _bad(path, f"an index of {sorted(file.keys())}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _bad(path, f"a file that cannot be read ({error})") from error
    facts = metadata.get("facts", "")
    if _checksum(tensors, facts) != metadata.get("sha256"):
        raise _bad(path, "an index that fails its checksum")
    try:
        return _checked(tensors, json.loads(facts))
    except (ValueError, TypeError) as error:
        raise _bad(path, f"an index of wrong contents ({error})") from error


def _checked(tensors: dict[str, Tensor], facts: dict[str, Any]) -> Index:
    embeddings, names = tensors["embeddings"], json.loads(bytes(tensors["names"].numpy()))
    if embeddings.dtype != torch.float32 or embeddings.dim() != 2:
        raise ValueError(f"embeddings {embeddings.dtype} {list(embeddings.shape)}")
    if not isinstance(names, list) or len(names) != len(embeddings):
        raise ValueError(f"names of {len(names)} images for {len(embeddings)} embeddings")
    found = Facts(**facts)
    if not isinstance(found.folder, str) or not isinstance(found.model, str):
        raise TypeError("facts without paths")
    return Index(embeddings, [str(name) for name in names], found)


def _bad(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"index {path}: got {reason}, expected one that `mbm-kernels retrieve index` wrote; "
        "make it again"
    )


def _checksum(tensors: dict[str, Tensor], facts: str) -> str:
    found = hashlib.sha256(facts.encode())
    for name in ("embeddings", "names"):
        x = tensors[name]
        found.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        found.update(x.contiguous().numpy().data)
    return found.hexdigest()


def _by_blocks(rows: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values = queries.new_empty(len(queries), 0)
    ids = torch.empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(rows), BLOCK):
        scores = queries @ rows[start : start + BLOCK].T  # [Q, block]
        best = scores.topk(min(k, scores.shape[1]), dim=1)
        ids = torch.cat([ids, best.indices + start], dim=1)
        values, kept = torch.cat([values, best.values], dim=1).topk(min(k, ids.shape[1]), dim=1)
        ids = ids.gather(1, kept)
    ids, order = ids.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _by_faiss(rows: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    import faiss

    flat = faiss.IndexFlatIP(rows.shape[1])
    flat.add(rows.numpy())
    values, ids = flat.search(queries.contiguous().numpy(), k)
    return torch.from_numpy(values), torch.from_numpy(ids)
