"""The index: exact search, its file, folders with bad images."""

import json
import sys
import types
from dataclasses import asdict

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mbm_kernels.captioning import checkpoint
from mbm_kernels.captioning.kinds import TWO_TOWER
from mbm_kernels.retrieval import index as indexes
from mbm_kernels.retrieval.folder import check_same_model, index_folder
from mbm_kernels.retrieval.index import Facts, Index

from .helpers import distinct, save_images

FACTS = Facts("/images", "/run", {"model.safetensors": "1", "tokenizer.json": "2"})


def made(count, size=8):
    rows = torch.randn(count, size, generator=torch.Generator().manual_seed(count))
    rows = torch.nn.functional.normalize(rows, dim=1)
    return Index(rows, [f"{k}.png" for k in range(count)], FACTS)


@pytest.mark.parametrize("count", [1, 7, indexes.BLOCK, indexes.BLOCK + 3, 3 * indexes.BLOCK])
def test_search_is_exact(count):
    index, queries = made(count), made(5).embeddings
    values, rows = index.search(queries, 7)
    truth = queries.double() @ index.embeddings.double().T
    best = truth.topk(min(7, count), dim=1)
    assert values.shape == rows.shape == (5, min(7, count))
    torch.testing.assert_close(values.double(), best.values, atol=1e-6, rtol=0)
    torch.testing.assert_close(truth.gather(1, rows), best.values, atol=1e-6, rtol=0)
    assert all(len(set(row)) == len(row) for row in rows.tolist())


def test_equals_come_in_the_folders_order():
    index = made(6)
    index = Index(index.embeddings[[0, 1, 1, 2, 1, 0]], index.names, FACTS)
    _, rows = index.search(index.embeddings[1:2], 3)
    assert rows.tolist() == [[1, 2, 4]]


def test_faiss_is_used_where_it_is_installed(monkeypatch):
    class Flat:
        def __init__(self, size):
            assert size == 8

        def add(self, rows):
            self.rows = torch.from_numpy(rows)

        def search(self, queries, k):
            found = (torch.from_numpy(queries) @ self.rows.T).topk(k, dim=1)
            return found.values.numpy(), found.indices.numpy()

    index, queries = made(20), made(3).embeddings
    expected = index.search(queries, 4)
    faiss = types.ModuleType("faiss")
    faiss.IndexFlatIP = Flat
    monkeypatch.setitem(sys.modules, "faiss", faiss)
    monkeypatch.setattr(indexes, "find_spec", lambda name: name == "faiss")
    monkeypatch.setattr(indexes, "_by_blocks", None)
    for ours, theirs in zip(index.search(queries, 4), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_bad_queries():
    index = made(4)
    with pytest.raises(ValueError, match=r"queries: got shape \[1, 9\], expected \[Q, 8\]"):
        index.search(torch.zeros(1, 9), 1)
    with pytest.raises(ValueError, match="top: got 0, expected at least 1"):
        index.search(torch.zeros(1, 8), 0)


def test_the_file_keeps_everything(tmp_path):
    index = Index(made(3).embeddings, ["a.png", "kätzchen/日.jpg", "\udcff.png"], FACTS)
    path = tmp_path / "new" / "images.index"
    index.save(path)
    found = indexes.load(path)
    assert torch.equal(found.embeddings, index.embeddings)
    assert (found.names, found.facts) == (index.names, FACTS)
    assert [p.name for p in path.parent.iterdir()] == ["images.index"]


def flip(place):
    def change(path):
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)

    return change


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def rewrite(drop=(), seal=True, facts=None, **changes):
    """A file of the format and checksum that a program of evil intent could write."""

    def change(path):
        index = indexes.load(path)
        tensors = {"embeddings": index.embeddings, "names": text(index.names)} | changes
        told = json.dumps(asdict(index.facts)) if facts is None else facts
        sums = indexes._checksum(tensors, told) if seal else "0"
        metadata = {"format": "mbm_kernels.index", "version": "1", "facts": told, "sha256": sums}
        save_file(tensors, path, {k: v for k, v in metadata.items() if k not in drop})

    return change


def text(value):
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


DAMAGE = {
    "cut": (cut, "a file that cannot be read"),
    "empty": (lambda p: p.write_bytes(b""), "a file that cannot be read"),
    "an image": (lambda p: Image.new("RGB", (9, 9)).save(p, "PNG"), "a file that cannot be read"),
    "a flipped bit at the end": (flip(-1), "fails its checksum"),
    "other safetensors": (lambda p: save_file({"x": torch.zeros(2)}, p), "format None version"),
    "no format": (rewrite(drop=("format",)), "format None version '1'"),
    "another sum": (rewrite(seal=False), "fails its checksum"),
    "another tensor": (rewrite(more=torch.zeros(2)), r"an index of \['embeddings', 'more'"),
    "fewer names": (rewrite(names=text(["a"])), "names of 1 images for 3 embeddings"),
    "names in no encoding": (rewrite(names=torch.tensor([255, 254]).byte()), "wrong contents"),
    "whole numbers": (rewrite(embeddings=torch.zeros(3, 8).long()), r"embeddings torch\.int64"),
    "no facts": (rewrite(facts="{}"), "wrong contents"),
    "facts that are no JSON": (rewrite(facts="{"), "wrong contents"),
    "paths that are numbers": (
        rewrite(facts='{"folder": 3, "model": "", "identity": {}}'),
        "facts without paths",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_file_is_refused(damage, tmp_path):
    change, reason = DAMAGE[damage]
    path = tmp_path / "index"
    made(3).save(path)
    change(path)
    with pytest.raises(ValueError, match=f"index {path}: got .*{reason}.*; make it again"):
        indexes.load(path)


def test_no_file_and_no_place(tmp_path):
    with pytest.raises(FileNotFoundError, match="got no such file, expected an index; make one"):
        indexes.load(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"got a path that cannot be written .*; give another"):
        made(3).save(tmp_path / "file" / "index")


@pytest.fixture
def found(trained_run):
    return checkpoint.load(trained_run, layers="stock", kind=TWO_TOWER)


def test_bad_images_are_counted(found, trained_run, tmp_path):
    folder = save_images(tmp_path / "images", distinct())
    save_images(folder / "below", distinct())
    whole = (folder / "a-dark-red-square.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[:-30])
    (folder / "text.jpg").write_text("no image")
    (folder / "notes.txt").write_text("not an image by its name")
    said = []
    index, scan = index_folder(folder, found, trained_run, said.append)
    assert (scan.read, len(scan.bad), scan.other) == (12, 2, 1)
    assert str(scan) == "12 images, 2 that cannot be read, 1 other files"
    assert said == scan.bad
    assert "cut.png" in said[0]
    assert "text.jpg" in said[1]
    assert index.names == sorted(n for n in index.names if "/" not in n) + sorted(
        n for n in index.names if "/" in n
    )
    assert len(index) == 12
    torch.testing.assert_close(index.embeddings[:6], index.embeddings[6:])
    assert index.facts.folder == str(folder.resolve())


def test_folders_without_images(found, trained_run, tmp_path):
    with pytest.raises(FileNotFoundError, match="got no such folder, expected one of images"):
        index_folder(tmp_path / "absent", found, trained_run)
    with pytest.raises(ValueError, match="got 0 images, expected at least one image"):
        index_folder(tmp_path, found, trained_run)
    (tmp_path / "bad.png").write_text("no image")
    with pytest.raises(ValueError, match=r"got 0 images, 1 that cannot be read \(picture .*bad"):
        index_folder(tmp_path, found, trained_run)


def test_another_models_index_is_refused(found, trained_run, tmp_path):
    index, _ = index_folder(save_images(tmp_path / "images", distinct()), found, trained_run)
    check_same_model(index, found, tmp_path / "index")
    other = Index(index.embeddings, index.names, FACTS)
    with pytest.raises(ValueError, match=r"got the embeddings of another model than .*; give the"):
        check_same_model(other, found, tmp_path / "index")
