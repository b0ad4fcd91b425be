"""Data of one's own from the scan to a loaded set: files, splits, manifest, decoded images."""

import json
import multiprocessing
import os
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from mbm_kernels.captioning import data
from mbm_kernels.captioning.data import CaptionSet, own
from mbm_kernels.captioning.data.locate import locate
from mbm_kernels.captioning.data.manifest import MANIFEST, SKIPPED, read
from mbm_kernels.captioning.data.readers import Listing
from mbm_kernels.captioning.data.readers import read as scan
from mbm_kernels.captioning.data.splitting import assign
from mbm_kernels.captioning.lock import locked
from mbm_kernels.captioning.pictures import read_picture

from .own_helpers import FORMATS, captions, image_bytes, karpathy, reasons, tar, write, write_images

SIZE = 16


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MBM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(path, images=None, **options):
    return data.load(str(path), images=images, image_size=SIZE, **options)


def table(root, lines, header="image,caption"):
    path = root / "table.csv"
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def skipped(folder):
    return [json.loads(line) for line in (folder / SKIPPED).read_text().splitlines()]


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_loads_whole(format, tmp_path):
    path, images = write(format, tmp_path)
    sets = load(path, images)
    assert list(sets) == ["train", "val", "test"]
    assert sum(len(s.ids) for s in sets.values()) == 30
    for one in sets.values():
        assert one.images.shape == (len(one.ids), 3, SIZE, SIZE)
        for name, pixels, texts in zip(one.ids, one.images, one.references, strict=True):
            stem = name.rsplit("/", 1)[-1].removesuffix(".png")
            k = int(stem)
            file = tmp_path / f"k{k}.png"
            file.write_bytes(image_bytes(k))
            assert texts == [text.lower() for text in captions(k)]
            assert torch.equal(pixels, read_picture(file, SIZE))


def test_karpathy_splits_are_kept_and_others_drawn(tmp_path):
    path, images = write("karpathy", tmp_path)
    content = {f"{image['filename']}": image["split"] for image in karpathy()["images"]}
    for split, one in load(path, images).items():
        given = {content[name] for name in one.ids}
        assert given == ({"train", "restval"} if split == "train" else {split})
    sets = load(*write("csv", tmp_path / "other"))
    assert {split: len(one.ids) for split, one in sets.items()} == {
        "train": 24, "val": 3, "test": 3
    }  # fmt: skip


def test_a_set_with_several_captions_makes_batches(tmp_path):
    sets = load(*write("coco", tmp_path))
    train = sets["train"]
    assert len(train) == 2 * len(train.ids)
    tokenizer = data.WordTokenizer.train(train.captions)
    images, tokens, _ = data.collate(train, [0, 1, 4], tokenizer)
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[2], data.normalise(train.images[2]))
    assert tokenizer.decode(tokens[2].tolist()) == train.captions[4] == train.references[2][0]


def test_limit_keeps_whole_images(tmp_path):
    path, images = write("coco", tmp_path)
    sets = load(path, images, limit=2)
    assert {split: len(s.ids) for split, s in sets.items()} == {"train": 2, "val": 2, "test": 2}
    assert len(sets["train"]) == 4
    assert torch.equal(sets["val"].images, load(path, images)["val"].images[:2])


def test_bad_images_are_counted_and_the_rest_is_loaded(tmp_path):
    root = write_images(tmp_path / "images", 12)
    (root / "text.png").write_text("no image")
    (root / "cut.png").write_bytes(image_bytes(3)[:60])
    (root / "empty.png").write_bytes(b"")
    (root / "folder.png").mkdir()
    os.mkfifo(root / "pipe.png")
    header = struct.pack(">IIBBBBB", 1 << 20, 1 << 20, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    huge = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
    (root / "huge.png").write_bytes(huge + struct.pack(">I", zlib.crc32(chunk)) + b"\0" * 40)
    (tmp_path / "outside.png").write_bytes(image_bytes(1))
    (root / "out.png").symlink_to(tmp_path / "outside.png")
    (root / "loop.png").symlink_to("loop.png")
    (root / "inside.png").symlink_to("000.png")
    names = [f"{k:03d}.png" for k in range(12)]
    names += [
        "text.png", "cut.png", "empty.png", "folder.png", "pipe.png", "huge.png", "out.png",
        "loop.png", "inside.png", "absent.png", "../outside.png", "/etc/passwd", "a\\b.png",
        "https://x.org/a.png", "x" * 300, "./001.png", str(root / "002.png"), ".",
    ]  # fmt: skip
    path = table(tmp_path, [f"{name},a thing" for name in names])
    lines = []
    folder = own.prepare(path, root, image_size=SIZE, progress=lines.append)
    held = read(folder)
    ids = sorted(name for ids, _ in held.splits.values() for name in ids)
    assert ids == [f"{k:03d}.png" for k in range(12)]
    captions_of = {
        i: c for ids, given in held.splits.values() for i, c in zip(ids, given, strict=True)
    }
    assert captions_of["000.png"] == ["a thing", "a thing"]
    assert held.skipped == len(names) - 12 - 3
    assert {row["what"]: row["why"] for row in skipped(folder)} == {
        "text.png": "it does not decode",
        "cut.png": "it does not decode",
        "huge.png": "it does not decode",
        "empty.png": "its file is empty",
        "folder.png": "it is no plain file",
        "pipe.png": "it is no plain file",
        "out.png": "its name leads out of the images folder",
        "../outside.png": "its name leads out of the images folder",
        "/etc/passwd": "its name leads out of the images folder",
        ".": "its name leads out of the images folder",
        "loop.png": "its file cannot be opened (Too many levels of symbolic links)",
        "x" * 157 + "...": "its file cannot be opened (File name too long)",
        "absent.png": "there is no such file",
        "a\\b.png": "there is no such file",
        "https://x.org/a.png": "its name is an address; download the images first",
    }
    assert "skipped 3 images: it does not decode (" in "\n".join(lines)
    assert f"data: table, {path}" in lines


def test_a_damaged_shard_loses_its_own_images_alone(tmp_path):
    path, _ = write("webdataset", tmp_path)
    listing = scan(path)
    entries = locate(listing, None)
    whole = (path / "00015.tar").read_bytes()
    (path / "00015.tar").write_bytes(whole[:5000])
    from mbm_kernels.captioning.data.decoding import decode

    with (tmp_path / "raw").open("wb+") as raw:
        done = decode(entries, SIZE, raw, listing.skipped)
    assert set(range(15)) < set(done)
    assert len(done) + len(listing.skipped.rows) == 30
    assert set(reasons(listing)) == {("image", "its shard is damaged")}


def test_windows_separators_and_absolute_names_inside_are_found(tmp_path):
    root = write_images(tmp_path / "images" / "deep", 3).parent
    lines = ["deep\\000.png,a", f"{root}/deep/001.png,b", "deep/../deep/002.png,c"]
    sets = load(table(tmp_path, lines), root)
    assert sorted(i for s in sets.values() for i in s.ids) == [f"deep/00{k}.png" for k in range(3)]


def test_same_content_comes_into_one_split(tmp_path):
    root = write_images(tmp_path / "images", 30)
    for k in range(30):
        for copy in "ab":
            (root / f"{copy}{k}.png").write_bytes(image_bytes(k))
    names = sorted(path.name for path in root.iterdir())
    sets = load(table(tmp_path, [f"{name},x" for name in names]), root)
    kept = {split: {int(name.strip("ab.png")) for name in one.ids} for split, one in sets.items()}
    assert sum(len(one.ids) for one in sets.values()) == 90
    assert (
        not kept["train"] & kept["val"] | kept["train"] & kept["test"] | kept["val"] & kept["test"]
    )


def test_splits_are_seeded_and_hardly_change_when_images_come(tmp_path):
    marks = [f"{k}" for k in range(1000)]
    none = [None] * 1000
    first, again, other = (assign(none, marks, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert {split: len(rows) for split, rows in first.items()} == {
        "train": 800, "val": 100, "test": 100
    }  # fmt: skip
    more = assign([None] * 1010, [*marks, *(f"new {k}" for k in range(10))], 0)
    assert len(set(first["train"]) - set(more["train"])) < 10
    assert assign([None] * 2, ["a", "b"], 0).keys() == {"train"}
    assert {s: len(r) for s, r in assign([None] * 3, ["a", "b", "c"], 0).items()} == {
        "train": 1, "val": 1, "test": 1
    }  # fmt: skip
    given = assign(["test", None, "fold-1", "train"], list("abcd"), 0)
    assert {split: sorted(rows) for split, rows in given.items()} == {
        "train": [1, 3], "test": [0], "fold-1": [2]
    }  # fmt: skip


def test_prepare_is_done_once_and_again_when_files_change(tmp_path, cache, monkeypatch):
    path, images = write("csv", tmp_path)
    folder = own.prepare(path, images, image_size=SIZE)
    assert folder.parent == cache / "data"
    assert sorted(p.name for p in folder.iterdir()) == ["images-16", MANIFEST, SKIPPED]
    before = (folder / MANIFEST).stat().st_mtime_ns
    monkeypatch.setattr(own, "decode", lambda *_, **__: pytest.fail("decoded again"))
    assert own.prepare(path, images, image_size=SIZE) == folder
    monkeypatch.undo()
    monkeypatch.setenv("MBM_CACHE", str(cache))
    own.prepare(path, images, image_size=24)
    assert (folder / MANIFEST).stat().st_mtime_ns == before
    assert (folder / "images-24").is_dir()
    (images / "000.png").write_bytes(image_bytes(0) + b"changed")
    own.prepare(path, images, image_size=24)
    assert (folder / MANIFEST).stat().st_mtime_ns != before
    assert sorted(p.name for p in folder.iterdir()) == ["images-24", MANIFEST, SKIPPED]


def test_the_seed_of_the_manifest_stays_until_another_is_given(tmp_path):
    path, images = write("csv", tmp_path)

    def ids(size, seed=None):
        return read(own.prepare(path, images, image_size=size, seed=seed)).splits["val"][0]

    first = ids(16, 7)
    assert ids(16) == ids(24) == first != ids(16, 0)
    (images / "000.png").write_bytes(image_bytes(0) + b"changed")
    assert read(own.prepare(path, images, image_size=16)).seed == 0


def test_a_prepared_folder_is_data_too(tmp_path):
    path, images = write("csv", tmp_path)
    folder = own.prepare(path, images, folder=tmp_path / "made", image_size=SIZE)
    expected = load(path, images)
    (tmp_path / "images").rename(tmp_path / "gone")
    sets = load(folder)
    assert all(torch.equal(sets[s].images, expected[s].images) for s in expected)
    with pytest.raises(ValueError, match=r"images: got .*expected a folder"):
        data.load(str(folder), image_size=24)
    (tmp_path / "gone").rename(tmp_path / "images")
    assert data.load(str(folder), image_size=24)["val"].images.shape[-1] == 24


def damage(folder, change):
    path = folder / MANIFEST
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("splits"),
        lambda c: c.update(splits=[]),
        lambda c: c.update(splits={}),
        lambda c: c.update(version=99),
        lambda c: c.update(seed="x"),
        lambda c: c["splits"]["train"]["ids"].pop(),
        lambda c: c["splits"].update({"../x": c["splits"]["train"]}),
        lambda c: c["splits"]["train"]["captions"].__setitem__(0, []),
        lambda c: c["splits"]["train"]["captions"].__setitem__(0, [3]),
    ],
)
def test_a_damaged_manifest_is_refused_or_made_again(change, tmp_path):
    path, images = write("csv", tmp_path)
    folder = own.prepare(path, images, image_size=SIZE)
    damage(folder, change)
    with pytest.raises(ValueError, match=r"got a damaged manifest .*expected what prepare wrote"):
        load(folder)
    assert sum(len(one.ids) for one in load(path, images).values()) == 30


def test_damaged_pixels_are_refused(tmp_path):
    path, images = write("csv", tmp_path)
    folder = own.prepare(path, images, image_size=SIZE)
    pixels = folder / "images-16" / "val.npy"
    np.save(pixels, np.zeros((1, 3, 16, 16), np.uint8))
    with pytest.raises(ValueError, match=r"got uint8 \[1, 3, 16, 16\], expected 3 images of 16"):
        load(path, images)
    pixels.write_bytes(pixels.read_bytes()[:60])
    with pytest.raises(ValueError, match="got pixels that cannot be read"):
        load(path, images)


def test_a_folder_of_other_things_is_not_written_into(tmp_path):
    path, images = write("csv", tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").write_text("precious")
    with pytest.raises(ValueError, match=r"got a folder that holds thesis.doc, expected an empty"):
        own.prepare(path, images, folder=tmp_path / "mine", image_size=SIZE)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.doc"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["absent.png,x"], "got none of 1 images .absent.png: there is no such file.* --images"),
        (["text.png,x"], r"got no image with a caption .skipped 1 image: it does not decode"),
        (["000.png,"], r"got no image with a caption .*no caption"),
        ([], "got no image with a caption .it is empty"),
    ],
)
def test_nothing_left_says_why_and_leaves_nothing(lines, message, tmp_path, cache):
    root = write_images(tmp_path / "images", 1)
    (root / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=message):
        load(table(tmp_path, lines), root)
    assert not list((cache / "data").glob("*"))


def test_too_many_splits_are_no_splits(tmp_path):
    root = write_images(tmp_path / "images", 20)
    path = table(tmp_path, [f"{k:03d}.png,x,fold{k}" for k in range(20)], "image,caption,split")
    with pytest.raises(ValueError, match=r"got 20 splits .*expected at most 16"):
        load(path, root)


@pytest.mark.parametrize("size", [8, 20, 0, -16, 8192])
def test_impossible_sizes_are_refused_before_anything_is_read(size, tmp_path):
    with pytest.raises(ValueError, match=f"image_size: got {size}, expected"):
        own.prepare(tmp_path / "absent", image_size=size)


def test_a_stop_at_any_moment_leaves_no_manifest(tmp_path, monkeypatch):
    path, images = write("csv", tmp_path)
    folder = own.prepare(path, images, image_size=SIZE)
    (images / "000.png").write_bytes(image_bytes(0) + b"changed")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(own, "write_pixels", stop)
        with pytest.raises(KeyboardInterrupt):
            own.prepare(path, images, image_size=SIZE)
    assert not (folder / MANIFEST).exists()
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]
    assert sum(len(one.ids) for one in load(path, images).values()) == 30


def test_a_folder_that_another_process_prepares_is_refused(tmp_path):
    path, images = write("csv", tmp_path)
    with locked(tmp_path / "made", "data"), pytest.raises(RuntimeError, match="works in, expected"):
        own.prepare(path, images, folder=tmp_path / "made", image_size=SIZE)


def test_any_number_of_threads_gives_the_same(tmp_path):
    path, images = write("webdataset", tmp_path)
    made = [
        own.prepare(path, images, folder=tmp_path / f"by{n}", image_size=SIZE, workers=n)
        for n in (1, 7)
    ]
    first, second = (read(folder) for folder in made)
    assert first.splits == second.splits
    for split in first.splits:
        a, b = (np.load(folder / "images-16" / f"{split}.npy") for folder in made)
        assert (a == b).all()


def test_no_thread_is_left_and_a_fork_does_not_hang(tmp_path):
    path, images = write("coco", tmp_path)
    before = threading.active_count()
    sets = load(path, images)
    assert threading.active_count() == before
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    other = write("csv", tmp_path / "other")

    def child():
        torch.set_num_threads(1)  # as a DataLoader's worker: OpenMP's threads stay with the parent
        again = load(*other)  # decodes by threads of its own
        queue.put((int(sets["val"].images.sum()), sum(len(one.ids) for one in again.values())))

    process = context.Process(target=child)
    process.start()
    process.join(60)
    alive = process.is_alive()
    if alive:
        process.kill()
    assert not alive
    assert queue.get() == (int(sets["val"].images.sum()), 30)


def test_the_file_of_pixels_is_never_written_to(tmp_path):
    path, images = write("coco", tmp_path)
    sets = load(path, images)
    sets["train"].images.zero_()
    assert int(load(path, images)["train"].images.sum()) > 0


def test_pictures_decode_upright_on_white_in_eight_bits(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.arange(1200, dtype=np.uint8).reshape(20, 60)).save(root / "t.jpg", exif=exif)
    Image.fromarray(np.arange(0, 60000, 100, dtype=np.uint16).reshape(20, 30)).save(root / "16.png")
    Image.new("RGBA", (9, 400), (0, 0, 0, 0)).save(root / "tall.png")
    sets = load(table(tmp_path, ["t.jpg,x", "16.png,y", "tall.png,z"]), root)
    for one in sets.values():
        for name, pixels in zip(one.ids, one.images, strict=True):
            assert torch.equal(pixels, read_picture(root / name, SIZE))


@pytest.mark.parametrize(
    ("image_of", "message"),
    [([0, 0], "got 2 images, 2 ids, 3 captions and 2 entries"), ([0, 1, 0], "image_of: got images"),
     ([1, 1, 1], "image_of: got images"), ([0, 1, 2], "image_of: got images")],
)  # fmt: skip
def test_images_of_captions_are_checked(image_of, message):
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        CaptionSet(images, ["a", "b", "c"], ["x", "y"], torch.tensor(image_of))


def test_a_built_in_name_takes_no_images_and_a_path_must_exist(tmp_path):
    with pytest.raises(ValueError, match="images: got x for scenes, expected None"):
        data.load("scenes", images="x", limit=1)
    with pytest.raises(ValueError, match=r"got data set '.*absent', expected one of"):
        data.load(str(tmp_path / "absent"))


def test_an_empty_listing_locates_nothing(tmp_path):
    assert locate(Listing("table", tmp_path), None) == []
    with pytest.raises(ValueError, match="expected a folder"):
        locate(Listing("table", tmp_path), tmp_path / "absent")


def test_tar_members_of_one_shard_may_share_a_name_with_another(tmp_path):
    for shard in ("a", "b"):
        content = [("0.png", image_bytes(ord(shard) % 30)), ("0.txt", shard.encode())]
        (tmp_path / f"{shard}.tar").write_bytes(tar(content))
    assert {i for s in load(tmp_path).values() for i in s.ids} == {"a.tar/0", "b.tar/0"}
