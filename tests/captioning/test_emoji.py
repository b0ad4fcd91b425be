"""The emoji data set, from a tiny package folder made here; nothing is downloaded."""

from __future__ import annotations

import io
import json
import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mbm_kernels.captioning import data
from mbm_kernels.captioning.data import emoji

TONES = {"1F3FB": "light skin tone", "1F3FD": "medium skin tone", "1F3FF": "dark skin tone"}
THINGS = {
    "1F44B": "waving hand",
    "1F44D": "thumbs up",
    "1F590-FE0F": "hand with fingers splayed",
    "1F9D1": "Person",
    "1F466": "boy",
    "1F467": "girl",
}
PLAIN = {"1F980": "crab", "0023-FE0F-20E3": "keycap: #"}
COUNT = len(THINGS) * (1 + len(TONES)) + len(PLAIN)


def _labels() -> list[dict]:
    def skins(code: str, label: str) -> list[dict]:
        stem = code.removesuffix("-FE0F")
        return [{"hexcode": f"{stem}-{t}", "label": f"{label}: {n}"} for t, n in TONES.items()]

    combined = [
        {"hexcode": code, "label": label, "skins": skins(code, label)}
        for code, label in THINGS.items()
    ]
    unused = [{"hexcode": "1F1E6", "label": "regional indicator A"}]
    return combined + [{"hexcode": c, "label": label} for c, label in PLAIN.items()] + unused


def _codes() -> list[str]:
    return [one["hexcode"] for entry in _labels()[:-1] for one in (entry, *entry.get("skins", ()))]


def _png(vendor: str, index: int) -> bytes:
    """A disc in the vendor's colour, transparent round it; every third one in palette mode."""
    colour = (200, 20 + index, 0, 255) if vendor == "google" else (0, 20 + index, 200, 255)
    image = Image.new("RGBA", (64, 64), (9, 9, 9, 0))
    image.paste(colour, (16, 16, 48, 48))
    if index % 3 == 0:
        image = image.quantize(8)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _files(package: str) -> dict[str, bytes]:
    version = "16.0.3" if package == "emojibase-data" else "16.0.0"
    files = {"package.json": json.dumps({"name": package, "version": version}).encode()}
    if package == "emojibase-data":
        files["en/data.json"] = json.dumps(_labels()).encode()
        files["de/data.json"] = b"not read"
    else:
        vendor = package.rsplit("-", 1)[-1]
        for index, code in enumerate(_codes()):
            files[f"img/{vendor}/64/{code.lower()}.png"] = _png(vendor, index)
        files[f"img/{vendor}/sheets/64.png"] = b"not read"
    return files


PACKAGES = ("emojibase-data", "emoji-datasource-google", "emoji-datasource-twitter")


def _write_tgz(
    folder: Path, package: str, files: dict[str, bytes], *extra: tarfile.TarInfo
) -> Path:
    version = "16.0.3" if package == "emojibase-data" else "16.0.0"
    path = folder / f"{package}-{version}.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for member in extra:
            archive.addfile(member, io.BytesIO(b"x" * member.size))
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(emoji, "EXPECTED_IMAGES", COUNT)
    folder = tmp_path / "archives"
    folder.mkdir()
    for package in PACKAGES:
        _write_tgz(folder, package, _files(package))
    return folder


@pytest.fixture
def prepared(archives: Path, tmp_path: Path) -> Path:
    return emoji.prepare(tmp_path / "cache", archives)


def _refused(tmp_path: Path, archives: Path, message: str) -> None:
    """prepare raises, and leaves neither the folder nor a temporary one."""
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match=message):
        emoji.prepare(cache, archives)
    assert list(cache.iterdir()) == []


def test_prepare_joins_drawings_and_labels(prepared: Path, tmp_path: Path) -> None:
    assert prepared == tmp_path / "cache" / "emoji"
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["emoji"]
    manifest = json.loads((prepared / "manifest.json").read_text(encoding="utf-8"))
    assert len(manifest["labels"]) == COUNT
    assert manifest["labels"]["1F590"] == "hand with fingers splayed"  # FE0F is not part of it
    assert manifest["labels"]["0023-20E3"] == "keycap: #"
    assert manifest["labels"]["1F9D1-1F3FD"] == "person: medium skin tone"
    assert "1F1E6" not in manifest["labels"]
    for vendor in ("google", "twitter"):
        names = {p.stem for p in (prepared / vendor).iterdir()}
        assert names == set(manifest["labels"])


def test_extracted_packages_give_the_same_folder(
    prepared: Path, archives: Path, tmp_path: Path
) -> None:
    extracted = tmp_path / "extracted"
    for package, inside in zip(PACKAGES, ("package", ".", "."), strict=True):
        for name, content in _files(package).items():
            path = extracted / package / inside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    other = emoji.prepare(tmp_path / "other", extracted)
    for path in sorted(prepared.rglob("*")):
        if path.is_file():
            assert (other / path.relative_to(prepared)).read_bytes() == path.read_bytes()


def test_a_complete_folder_is_kept_and_a_damaged_one_made_again(
    prepared: Path, archives: Path, tmp_path: Path
) -> None:
    before = (prepared / "manifest.json").stat().st_mtime_ns
    assert emoji.prepare(tmp_path / "cache", tmp_path / "nowhere") == prepared
    assert (prepared / "manifest.json").stat().st_mtime_ns == before
    (prepared / "google" / "1F980.png").unlink()
    with pytest.raises(ValueError, match=r"got no .*1F980\.png, expected a drawing for each"):
        data.load("emoji", root=prepared)
    emoji.prepare(tmp_path / "cache", archives)
    assert (prepared / "google" / "1F980.png").is_file()
    (prepared / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"got a damaged .*manifest\.json"):
        data.load("emoji", root=prepared)
    emoji.prepare(tmp_path / "cache", archives)
    assert len(data.load("emoji", root=prepared)["train"]) > 0


def test_a_folder_of_other_versions_is_made_again(
    prepared: Path, archives: Path, tmp_path: Path
) -> None:
    path = prepared / "manifest.json"
    path.write_text(path.read_text(encoding="utf-8").replace("16.0.3", "15.0.0"), encoding="utf-8")
    emoji.prepare(tmp_path / "cache", archives)
    assert json.loads(path.read_text(encoding="utf-8"))["versions"]["emojibase-data"] == "16.0.3"


def test_splits_hold_what_they_promise(prepared: Path) -> None:
    sets = data.load("emoji", root=prepared)
    assert list(sets) == ["train", "held_out", "unseen_style"]
    train, held_out, unseen = sets.values()
    assert len(train) + len(held_out) == COUNT
    assert len(held_out) == 4  # a fifth of 19 with two parts, rounded up
    assert all(caption == caption.lower() for caption in train.captions)
    assert not set(train.captions) & set(held_out.captions)
    seen = {part for caption in train.captions for part in emoji.parts(caption)}
    assert {part for caption in held_out.captions for part in emoji.parts(caption)} <= seen
    assert all(len(emoji.parts(caption)) == 2 for caption in held_out.captions)
    assert unseen.captions == train.captions
    assert {i.split("/")[0] for i in train.ids + held_out.ids} == {"google"}
    assert {i.split("/")[0] for i in unseen.ids} == {"twitter"}
    # Google's are red here and Twitter's blue.
    assert (train.images[:, 0, 32, 32] == 200).all()
    assert (held_out.images[:, 0, 32, 32] == 200).all()
    assert (unseen.images[:, 2, 32, 32] == 200).all()


def test_transparency_becomes_white(prepared: Path) -> None:
    for split in data.load("emoji", root=prepared).values():
        assert split.images.dtype == torch.uint8
        assert tuple(split.images.shape[1:]) == (3, 64, 64)
        assert (split.images[:, :, :16] == 255).all()
        assert (split.images[:, :, 20:44, 20:44].amin(1) == 0).all()


def test_seed_draws_the_split_and_limit_takes_a_prefix(prepared: Path) -> None:
    first, again = (data.load("emoji", root=prepared, seed=1) for _ in range(2))
    other = data.load("emoji", root=prepared, seed=2)
    assert first["held_out"].captions == again["held_out"].captions
    assert set(first["held_out"].captions) != set(other["held_out"].captions)
    few = data.load("emoji", root=prepared, seed=1, limit=3, image_size=32)
    for name, split in few.items():
        assert split.captions == first[name].captions[:3]
        assert tuple(split.images.shape) == (3, 3, 32, 32)
    assert few["unseen_style"].captions == few["train"].captions


def test_tokenizer_loses_nothing_of_a_label(prepared: Path) -> None:
    sets = data.load("emoji", root=prepared)
    tokenizer = data.WordTokenizer.train(sets["train"].captions)
    for split in sets.values():
        for caption in split.captions:
            assert tokenizer.decode(tokenizer.encode(caption)) == caption


@pytest.mark.parametrize("seed", range(5))
def test_no_part_is_left_unseen(seed: int) -> None:
    labels = [f"{a}: {b}" for a in "abcd" for b in "wxyz"] + ["lone: part", "e: w, x", "f"]
    held_out = emoji.held_out_labels(labels, seed)
    kept = {part for label in set(labels) - held_out for part in emoji.parts(label)}
    assert len(held_out) == 4
    assert {part for label in held_out for part in emoji.parts(label)} <= kept


def _link(kind: bytes) -> Callable[[], tarfile.TarInfo]:
    def make() -> tarfile.TarInfo:
        member = tarfile.TarInfo("package/img/google/64/1f980.png")
        member.type, member.linkname = kind, "/etc/passwd"
        return member

    return make


def _named(name: str) -> Callable[[], tarfile.TarInfo]:
    def make() -> tarfile.TarInfo:
        member = tarfile.TarInfo(name)
        member.size = 4
        return member

    return make


@pytest.mark.parametrize(
    "make",
    [
        _named("package/../../evil.png"),
        _named("../evil.png"),
        _named("/absolute/evil.png"),
        _named("package\\..\\evil.png"),
        _link(tarfile.SYMTYPE),
        _link(tarfile.LNKTYPE),
        _link(tarfile.FIFOTYPE),
    ],
    ids=["climbs", "climbs_first", "absolute", "backslash", "symlink", "hardlink", "fifo"],
)
def test_hostile_archive_is_refused(
    archives: Path, tmp_path: Path, make: Callable[[], tarfile.TarInfo]
) -> None:
    name = "emoji-datasource-google"
    _write_tgz(archives, name, _files(name), make())
    before = sorted(p.name for p in tmp_path.iterdir())
    _refused(tmp_path, archives, "expected plain files inside the package")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*before, "cache"])


def test_a_drawing_name_that_is_no_code_point_is_refused(archives: Path, tmp_path: Path) -> None:
    name = "emoji-datasource-google"
    _write_tgz(archives, name, {**_files(name), "img/google/64/evil.png": _png("google", 0)})
    _refused(tmp_path, archives, r"got 'img/google/64/evil\.png' .* expected a name of code points")


def test_an_oversized_member_is_refused(
    archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mbm_kernels.captioning.data.packages.MAX_MEMBER_BYTES", 100)
    _refused(tmp_path, archives, "expected at most 100")


@pytest.mark.parametrize("package", PACKAGES)
def test_truncated_archive_is_refused(archives: Path, tmp_path: Path, package: str) -> None:
    path = next(archives.glob(f"{package}-*.tgz"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    _refused(tmp_path, archives, "cannot be read to its end .* fetch it again")


def test_truncated_picture_is_refused_by_prepare(archives: Path, tmp_path: Path) -> None:
    name = "emoji-datasource-twitter"
    files = _files(name)
    files["img/twitter/64/1f980.png"] = files["img/twitter/64/1f980.png"][:-40]
    _write_tgz(archives, name, files)
    _refused(tmp_path, archives, r"truncated or damaged picture, img/twitter/64/1f980\.png")


@pytest.mark.parametrize("kept", [0, 20, 120])
def test_truncated_picture_is_refused_by_load(prepared: Path, kept: int) -> None:
    path = prepared / "google" / "1F980.png"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"truncated or damaged picture, .*1F980\.png") as caught:
        data.load("emoji", root=prepared)
    assert "mbm-kernels caption prepare emoji" in str(caught.value)


def test_picture_of_another_size_is_refused(prepared: Path) -> None:
    Image.new("RGB", (65, 64)).save(prepared / "google" / "1F980.png")
    with pytest.raises(ValueError, match=r"got a picture of 65 x 64, .* expected 64 x 64"):
        data.load("emoji", root=prepared)


@pytest.mark.parametrize("state", ["no such folder", r"no manifest\.json in it"])
def test_missing_and_empty_folders_are_named(tmp_path: Path, state: str) -> None:
    root = tmp_path / "data"
    if "manifest" in state:
        root.mkdir()
    with pytest.raises(ValueError, match=f"{state}.*run `mbm-kernels caption prepare emoji`"):
        data.load("emoji", root=root)


def test_wrong_count_is_refused(archives: Path, tmp_path: Path) -> None:
    name = "emoji-datasource-twitter"
    files = _files(name)
    del files["img/twitter/64/1f980.png"]
    _write_tgz(archives, name, files)
    _refused(tmp_path, archives, f"got {COUNT - 1} drawings of 64 px in {name}, expected {COUNT}")


def test_a_drawing_without_a_label_is_refused(archives: Path, tmp_path: Path) -> None:
    for vendor in ("google", "twitter"):
        name = f"emoji-datasource-{vendor}"
        files = _files(name)
        files[f"img/{vendor}/64/1f9ff.png"] = files.pop(f"img/{vendor}/64/1f980.png")
        _write_tgz(archives, name, files)
    _refused(tmp_path, archives, r"got 1 drawings by google without a label .*\(1F9FF\)")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'[{"label": "crab"}]', b"[]"])
def test_labels_that_are_none_are_refused(archives: Path, tmp_path: Path, content: bytes) -> None:
    _write_tgz(archives, PACKAGES[0], {**_files(PACKAGES[0]), "en/data.json": content})
    _refused(tmp_path, archives, r"got no labels in en/data\.json")


def test_another_version_is_refused(archives: Path, tmp_path: Path) -> None:
    name = "emojibase-data"
    about = json.dumps({"name": name, "version": "15.0.0"}).encode()
    _write_tgz(archives, name, {**_files(name), "package.json": about})
    _refused(tmp_path, archives, r"with emojibase-data 15\.0\.0, expected emojibase-data 16\.0\.3")


def test_a_missing_package_is_named(archives: Path, tmp_path: Path) -> None:
    next(archives.glob("emojibase-data-*")).unlink()
    _refused(tmp_path, archives, r"expected emojibase-data-16\.0\.3\.tgz or a folder")
    _refused(tmp_path, tmp_path / "nowhere", "no such folder")


def test_missing_npm_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match=r"got no npm on PATH, expected .*from-dir"):
        emoji.prepare(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def _fake_npm(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    npm = folder / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_failing_npm_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_npm(tmp_path / "bin", "echo 'npm error network ENOTFOUND' >&2; exit 7", monkeypatch)
    with pytest.raises(RuntimeError, match=r"ended with 7.*npm error network ENOTFOUND.*from-dir"):
        emoji.prepare(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_npm_is_asked_for_the_pinned_versions(
    archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tmp_path / "asked"
    script = (
        f'echo "$*" >> "{asked}"; for last; do :; done\n'
        f'name=$(echo "$2" | tr @ -); cp "{archives}/$name.tgz" "$last/"'
    )
    _fake_npm(tmp_path / "bin", script, monkeypatch)
    said: list[str] = []
    folder = emoji.prepare(tmp_path / "cache", progress=said.append)
    assert len(data.load("emoji", root=folder)["train"]) == COUNT - 4
    specs = [line.split()[1] for line in asked.read_text().splitlines()]
    assert specs == [
        "emojibase-data@16.0.3",
        "emoji-datasource-google@16.0.0",
        "emoji-datasource-twitter@16.0.0",
    ]
    assert any("npm pack emojibase-data@16.0.3" in line for line in said)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["emoji"]


def test_an_interruption_leaves_nothing(archives: Path, tmp_path: Path) -> None:
    def interrupt(line: str) -> None:
        if "drawings by google" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        emoji.prepare(tmp_path / "cache", archives, progress=interrupt)
    assert list((tmp_path / "cache").iterdir()) == []


def test_default_cache_follows_the_environment(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MBM_CACHE", str(tmp_path / "cache"))
    assert emoji.default_cache_dir() == tmp_path / "cache"
    assert len(data.load("emoji")["train"]) == COUNT - 4
    monkeypatch.delenv("MBM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert emoji.default_cache_dir() == tmp_path / "xdg" / "mbm_kernels"


def test_fake_drawings_cover_palette_mode() -> None:
    modes = {Image.open(io.BytesIO(_png("google", i))).mode for i in range(3)}
    assert modes == {"P", "RGBA"}
    assert np.asarray(Image.open(io.BytesIO(_png("google", 0))).convert("RGBA"))[0, 0, 3] == 0
