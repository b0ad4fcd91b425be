"""The data sets out of Debian packages, from tiny packages made here; nothing is downloaded."""

import io
import subprocess
import tarfile

import numpy as np
import pytest
from PIL import Image

from mbm_kernels.captioning.data import debian, fashion, tuxpaint
from mbm_kernels.captioning.data.fashion import FASHION
from mbm_kernels.captioning.data.readers import contents, read
from mbm_kernels.captioning.data.tuxpaint import TUXPAINT

from .debian_helpers import COUNTS, MNIST, STAMPS, data_tar, deb, idx, photographs, stamps
from .own_helpers import image_bytes


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(tuxpaint, "LEAST", 4)
    monkeypatch.setattr(fashion, "COUNTS", COUNTS)


@pytest.mark.parametrize("form", ["deb", "folder"])
def test_stamps_with_a_sentence_become_a_shard(form, tmp_path):
    if form == "deb":
        deb(tmp_path / "tuxpaint-stamps-default_1_all.deb", data_tar(stamps()))
    else:
        for name, content in stamps().items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
    lines = []
    folder = TUXPAINT.prepare(tmp_path / "cache", tmp_path, lines.append)
    assert lines == ["tuxpaint: 4 images in stamps.tar"]
    listing = read(folder)
    assert {name: entry.captions for name, entry in listing.entries.items()} == {
        "stamps.tar/a/x0": ["thing 0."], "stamps.tar/a/x1": ["thing 1."],
        "stamps.tar/a/x2": ["thing 2."], "stamps.tar/v1-5": ["half €."],
    }  # fmt: skip
    entry = listing.entries["stamps.tar/a/x1"]
    assert list(contents(entry.shard, [entry.member])) == [(entry.member, image_bytes(1))]
    assert TUXPAINT.prepare(tmp_path / "cache", tmp_path / "absent") == folder
    assert TUXPAINT.folder_of(folder) == folder


def test_photographs_become_a_shard_a_split(tmp_path):
    deb(tmp_path / "dataset-fashion-mnist_1_all.deb", data_tar(photographs(), "w:gz"))
    listing = read(FASHION.prepare(tmp_path / "cache", tmp_path))
    entries = list(listing.entries.values())
    assert [entry.split for entry in entries] == ["test"] * 10 + ["train"] * 12
    assert [entry.captions for entry in entries[:10]] == [[name] for name in fashion.CLASSES]
    _, content = next(contents(entries[12].shard, [entries[12].member]))
    with Image.open(io.BytesIO(content)) as image:
        assert (np.asarray(image) == 2).all()
        assert image.size == (28, 28)


def test_links_and_names_that_lead_out_are_not_read(tmp_path):
    link = tarfile.TarInfo(f"./{STAMPS}/a/link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    out = tarfile.TarInfo(f"./{STAMPS}/../../x.png")
    path = deb(tmp_path / "x.deb", data_tar(stamps(), extra=[link, out]))
    names = [name for name, _ in TUXPAINT.files(path)]
    assert "a/x0.png" in names
    assert not [name for name in names if "link" in name or ".." in name or "other" in name]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda whole: whole[:-300], "its data.tar is cut off"),
        (lambda whole: whole[:100], "it has no data.tar"),
        (lambda whole: b"", "it is no ar archive"),
        (lambda whole: b"x" * 500, "it is no ar archive"),
        (lambda whole: whole.replace(b"\xfd7zXZ", b"\x28\xb5\x2f\xfd\0"), "cannot be read to its"),
    ],
)
def test_damaged_packages_are_refused_and_leave_nothing(damage, message, tmp_path):
    path = deb(tmp_path / "tuxpaint-stamps-default_1_all.deb", data_tar(stamps()))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        TUXPAINT.prepare(tmp_path / "cache", tmp_path)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train-images-idx3-ubyte.gz": b"\x1f\x8b damaged"}, "got a damaged train-images"),
        ({"t10k-labels-idx1-ubyte.gz": idx([3] * 9, (9,))}, "got t10k-labels-idx1-ubyte.gz of 17"),
        ({"t10k-labels-idx1-ubyte.gz": idx([10] * 10, (10,))}, "got the label 10 in t10k"),
    ],
)
def test_other_photographs_are_refused(change, message, tmp_path):
    files = photographs() | {f"{MNIST}/{name}": content for name, content in change.items()}
    deb(tmp_path / "dataset-fashion-mnist_1_all.deb", data_tar(files))
    with pytest.raises(ValueError, match=message):
        FASHION.prepare(tmp_path / "cache", tmp_path)


def test_too_few_stamps_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tuxpaint, "LEAST", 5)
    deb(tmp_path / "tuxpaint-stamps-default_1_all.deb", data_tar(stamps()))
    with pytest.raises(ValueError, match="got 4 pictures with a text, expected 5 at least"):
        TUXPAINT.prepare(tmp_path / "cache", tmp_path)
    assert not list((tmp_path / "cache").iterdir())


def test_no_package_and_no_apt(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"from_dir: got .*expected dataset-fashion-mnist_"):
        FASHION.prepare(tmp_path / "cache", tmp_path)
    with pytest.raises(ValueError, match="run `mbm-kernels caption prepare fashion`"):
        FASHION.folder_of(tmp_path / "absent")
    monkeypatch.setattr(debian.shutil, "which", lambda _: None)
    with pytest.raises(RuntimeError, match="got no apt-get on PATH"):
        FASHION.prepare(tmp_path / "cache")


def test_apt_says_why(tmp_path, monkeypatch):
    def run(command, **options):
        assert command[1:] == ["download", "dataset-fashion-mnist"]
        return subprocess.CompletedProcess(command, 100, "", "E: Unable to locate package\n")

    monkeypatch.setattr(debian.shutil, "which", lambda _: "/usr/bin/apt-get")
    monkeypatch.setattr(debian.subprocess, "run", run)
    with pytest.raises(RuntimeError, match=r"ended with 100, .*Unable to locate package"):
        FASHION.prepare(tmp_path / "cache")


def test_a_shard_is_the_same_bytes_each_time(tmp_path):
    samples = [("a", {"png": b"x", "txt": b"y"})]
    for name in ("one.tar", "two.tar"):
        assert debian.write_shard(tmp_path / name, samples) == 1
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
