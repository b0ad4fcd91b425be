"""The readers of one's own data, on files as they should be and as they are found."""

import json
import os
import random
import re
import tarfile

import pytest

from mbm_kernels.captioning.data.readers import contents, read

from .own_helpers import (
    FORMATS,
    captions,
    coco,
    delimited,
    image_bytes,
    karpathy,
    reasons,
    samples,
    tar,
    write,
    write_images,
)


def found(listing):
    return {name: entry.captions for name, entry in listing.entries.items()}


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_gives_the_same_images_and_captions(format, tmp_path):
    path, _ = write(format, tmp_path)
    listing = read(path)
    assert not listing.skipped.rows
    expected = [[text.lower() for text in captions(k)] for k in range(30)]
    assert list(found(listing).values()) == expected


def table(tmp_path, content, name="table.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read(path)


def test_quotes_commas_newlines_and_crlf_are_csv(tmp_path):
    text = 'image,caption\r\na.png,"two men, one ""tall"""\r\nb.png,"over\r\ntwo lines"\r\n\r\n'
    listing = table(tmp_path, text)
    assert found(listing) == {"a.png": ['two men, one "tall"'], "b.png": ["over two lines"]}
    assert not listing.skipped.rows


def test_a_line_that_is_no_row_is_skipped_alone(tmp_path):
    lines = ["image,caption", "a.png,one", 'b.png,"never closed', "c.png,two, three", "d.png",
             'e.png,"closed" badly', "f.png,last"]  # fmt: skip
    listing = table(tmp_path, "\n".join(lines))
    assert found(listing) == {"a.png": ["one"], "f.png": ["last"]}
    assert [row.what.split()[-1] for row in listing.skipped.rows] == ["3", "4", "5", "6"]
    assert reasons(listing)[0] == ("line", "its quotes do not match")
    assert reasons(listing)[1] == ("line", "it has not the header's 2 fields")


def test_a_quote_that_closes_nothing_is_text_in_tsv(tmp_path):
    text = 'image\tcaption\na\t"Hello" he said\nb\t"open\nc\t"one\ttab"\nd\t"say ""x"""\n'
    listing = table(tmp_path, text, "table.tsv")
    assert found(listing) == {
        "a": ['"hello" he said'], "b": ['"open'], "c": ["one tab"], "d": ['say "x"'],
    }  # fmt: skip
    assert not listing.skipped.rows


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.encode("utf-16"),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.replace("\n", "\r").encode(),
    ],
)
def test_byte_order_marks_and_line_ends(encode, tmp_path):
    listing = table(tmp_path, encode("image,caption\na.png,côte d'ivoire\n"))
    assert found(listing) == {"a.png": ["côte d'ivoire"]}


def test_latin_1_is_skipped_row_by_row_not_guessed(tmp_path):
    listing = table(tmp_path, "image,caption\na.png,café\nb.png,tea\n".encode("latin-1"))
    assert found(listing) == {"a.png": [], "b.png": ["tea"]}
    assert reasons(listing) == [("caption", "it is not UTF-8")]


def test_captions_of_spaces_and_of_nothing_visible_are_skipped(tmp_path):
    rows = ["image,caption", "a.png,", "b.png,   ", "c.png,\u00a0\u3000", "d.png,\u200b", "e.png,x"]
    listing = table(tmp_path, "\n".join(rows))
    assert [k for k, v in found(listing).items() if v] == ["e.png"]
    assert reasons(listing) == [("caption", "it is empty")] * 4


def test_unicode_is_kept_in_lower_case(tmp_path):
    listing = table(tmp_path, "image,caption\na.png,ΟΔΟΣ e\u0301 北京 👩‍🚀\n")
    assert found(listing) == {"a.png": ["οδος \u00e9 北京 👩‍🚀"]}


def test_an_endless_caption_is_skipped(tmp_path):
    listing = table(tmp_path, f"image,caption\na.png,{'word ' * 1000}\n")
    assert reasons(listing) == [("caption", "it has more than 2000 characters")]


@pytest.mark.parametrize(
    ("header", "columns"),
    [
        ("image_name| comment_number| comment", ("image_name", "comment")),
        (",image,caption", ("image", "caption")),
        ("image,path,caption,text", ("image", "caption")),
        ("FILENAME,Description", ("filename", "description")),
    ],
)
def test_columns_are_found_by_name(header, columns, tmp_path):
    delimiter = "|" if "|" in header else ","
    fields = [field.strip().lower() for field in header.split(delimiter)]
    row = {columns[0]: "a.png", columns[1]: "one"}
    line = delimiter.join(f" {row.get(field, 'other')}" for field in fields)
    assert found(table(tmp_path, f"{header}\n{line}\n")) == {"a.png": ["one"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got an empty file for a header, expected one with a column for the image"),
        (b"a.png,a dog\n", "got 'a.png,a dog' for a header, expected .*add a first line"),
        (b"image,label\na.png,3\n", "got 'image,label' for a header"),
        (b"path,file,caption\na,b,c\n", "got the columns path, file, expected one for the image"),
        (b"image,text,comment\na,b,c\n", "got the columns text, comment, expected one for the ca"),
        (b"image,caption,caption\na,b,c\n", "got the columns caption, caption, expected one"),
    ],
)
def test_columns_that_do_not_tell_are_refused(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        table(tmp_path, content)


def test_json_lines_that_are_damaged_are_skipped(tmp_path):
    lines = [
        '{"image": "a.png", "caption": "one"}', '{"image": "b.png", "capt', "[1]", "",
        '{"image": "c.png"}', '{"image": 3, "caption": "x"}', '{"image": "d.png", "caption": null}',
        '{"image": "e.png", "captions": "other key"}', '{"image": "f.png", "caption": "\\ud800"}',
        "[" * 10_000,
    ]  # fmt: skip
    listing = table(tmp_path, "\n".join(lines), "table.jsonl")
    assert [k for k, v in found(listing).items() if v] == ["a.png"]
    assert reasons(listing) == [
        ("line", "it is not JSON"), ("line", "it is no JSON object"), ("line", "it is not JSON"),
        ("line", "it has no caption"), ("image", "its name is no text"),
        ("caption", "it is no text"), ("line", "it has no caption"), ("caption", "it is not UTF-8"),
    ]  # fmt: skip


@pytest.mark.parametrize("content", [b"", b"\n\n", b"not json\n", b"[]\n"])
def test_json_lines_of_nothing_are_refused(content, tmp_path):
    with pytest.raises(ValueError, match="got no JSON object, expected some"):
        table(tmp_path, content, "table.jsonl")


def test_coco_ids_are_numbers_or_text(tmp_path):
    content = coco(3)
    content["images"][0]["id"] = "0"
    content["annotations"][2]["image_id"] = "1"
    content["annotations"][3]["image_id"] = 1.0
    listing = table(tmp_path, json.dumps(content), "captions_x.json")
    assert [len(entry.captions) for entry in listing.entries.values()] == [2, 2, 2]
    assert not listing.skipped.rows


def test_coco_that_does_not_fit_together_is_counted(tmp_path):
    content = coco(4)
    content["images"] += [{"id": 3, "file_name": "other.png"}, {"id": 9}, "x", {"file_name": "y"}]
    content["images"] += [{"id": 50, "file_name": "bare.png"}, {"id": True, "file_name": "t.png"}]
    content["annotations"] += [
        {"image_id": 77, "caption": "of nothing"}, {"image_id": 0}, 5, {"caption": "no image"},
        {"image_id": 0, "caption": ["a list"]}, {"image_id": None, "caption": "x"},
    ]  # fmt: skip
    listing = table(tmp_path, json.dumps(content), "captions_x.json")
    assert list(found(listing)) == ["000.png", "001.png", "002.png", "003.png", "bare.png"]
    assert sorted(reasons(listing)) == sorted(
        [("image", "its id is another image's")]
        + [("image", "it has no id and file_name")] * 4
        + [("caption", "its image is not among the images")] * 3
        + [("caption", "the annotation has no caption")] * 2
        + [("caption", "it is no text")]
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(coco())[:-40], "got a file that is not JSON .*is it cut off"),
        ("[" * 100_000, "got a file that is not JSON"),
        ("", "got a file that is not JSON"),
        ("3", "got JSON with int, expected images and annotations"),
        ('{"info": 1, "images": []}', "got JSON with the keys images, info, expected"),
        ('{"images": [{"id": 1, "file_name": "a.png"}]}', "got JSON with the keys images"),
        ("[]", "got no JSON object"),
        ('[{"img": "a"}]', "got the columns img, expected one for the caption"),
    ],
)
def test_json_of_another_kind_is_refused(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        table(tmp_path, content, "captions_x.json")


def test_karpathy_keeps_its_splits(tmp_path):
    content = karpathy(8)
    content["images"] += [{"filename": "x.png"}, 3, {"sentences": []}]
    content["images"][0]["sentences"].append({"tokens": ["from", "tokens"]})
    content["images"][1]["split"] = "../../out"
    listing = table(tmp_path, json.dumps(content), "dataset_coco.json")
    splits = [entry.split for entry in listing.entries.values()]
    assert splits == ["train", None, "val", "test", "train", "train", "val", "test"]
    first = listing.entries["val2014/000.png"]
    assert first.names == ("val2014/000.png", "000.png")
    assert first.captions[-1] == "from tokens"
    why = [("image", "it has no filename and sentences")] * 3
    assert sorted(reasons(listing)) == [*why, ("split", "its name is no word")]


def test_an_image_in_two_splits_stays_in_the_first(tmp_path):
    listing = table(tmp_path, "image,caption,split\na,x,train\na,y,val\na,z,\na,w,valid\n")
    assert listing.entries["a"].split == "train"
    assert reasons(listing) == [("split", "the image is in two splits")] * 2


def test_flickr_tokens_and_the_lists_beside_them(tmp_path):
    (tmp_path / "Flickr_8k.trainImages.txt").write_text("a.jpg\n")
    (tmp_path / "Flickr_8k.devImages.txt").write_text("b.jpg\r\n")
    text = "a.jpg#0\tOne .\r\na.jpg#1\tTwo\n\nb.jpg#0\t\nbroken line\nc#d.jpg#0\tThree\tfour\n"
    listing = table(tmp_path, text, "Flickr8k.token.txt")
    assert found(listing) == {"a.jpg": ["one .", "two"], "b.jpg": [], "c#d.jpg": ["three four"]}
    assert [entry.split for entry in listing.entries.values()] == ["train", "val", None]
    assert reasons(listing) == [
        ("caption", "it is empty"),
        ("line", "it is not name#i, a tab and a caption"),
    ]


def test_folder_pairs_by_stem(tmp_path):
    write_images(tmp_path / "train", 3)
    write_images(tmp_path / "val", 2)
    for split in ("train", "val"):
        (tmp_path / split / "000.txt").write_text("One\n\n  Two  \n")
    (tmp_path / "val" / "001.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "train" / "001.txt").write_text("  \n")
    (tmp_path / "train" / "lonely.txt").write_text("no image")
    (tmp_path / "train" / ".hidden.png").write_bytes(b"x")
    (tmp_path / "train" / "002.txt").symlink_to("/etc/hostname")
    listing = read(tmp_path)
    assert [k for k, v in found(listing).items() if v] == ["train/000.png", "val/000.png"]
    assert found(listing)["val/000.png"] == ["one", "two"]
    assert listing.entries["val/000.png"].split == "val"
    assert ("text", "it leads out of the folder") in reasons(listing)
    assert ("text", "there is no image of the same stem") in reasons(listing)


def test_shards_are_read_by_key(tmp_path):
    members = [
        *samples(0, 2),
        ("deep/a.b.jpg", image_bytes(5)), ("deep/a.txt", b"deep"),
        ("c.png", image_bytes(6)), ("c.json", b'{"caption": "from json", "url": "x"}'),
        ("d.png", image_bytes(7)), ("d.txt", b"text"), ("d.json", b'{"caption": "not this"}'),
        ("e.json", b"{"), ("e.png", b""), ("f.cls", b"3"), ("._a.png", b"mac"),
        ("g.txt", b"no image"),
    ]  # fmt: skip
    path = tmp_path / "a.tar"
    path.write_bytes(tar(members))
    listing = read(path)
    assert found(listing) == {
        "a.tar/0000": [text.lower() for text in captions(0)],
        "a.tar/0001": [text.lower() for text in captions(1)],
        "a.tar/deep/a": ["deep"], "a.tar/c": ["from json"], "a.tar/d": ["text"], "a.tar/e": [],
    }  # fmt: skip
    assert reasons(listing) == [("member", "it is not JSON"), ("sample", "it has no image")]
    places = [entry.member for entry in listing.entries.values()]
    assert dict(contents(path, places))[places[1]] == image_bytes(1)


def test_hostile_members_are_skipped(tmp_path):
    path = tmp_path / "hostile.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind, size in (
            ("/abs.png", tarfile.REGTYPE, 0), ("../out.png", tarfile.REGTYPE, 0),
            ("a/../../b.txt", tarfile.REGTYPE, 0), ("link.png", tarfile.SYMTYPE, 0),
            ("hard.png", tarfile.LNKTYPE, 0), ("fifo.txt", tarfile.FIFOTYPE, 0),
            ("device.png", tarfile.CHRTYPE, 0),
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, size, "/etc/passwd"
            archive.addfile(member)
    listing = read(path)
    assert not listing.entries
    assert [why for _, why in reasons(listing)] == (
        ["its name is absolute or leads out"] * 3
        + ["it is no plain file but a link or a device"] * 4
    )


def test_a_member_of_huge_declared_size_is_skipped(tmp_path):
    text, image = tarfile.TarInfo("a.txt"), tarfile.TarInfo("b.png")
    text.size, image.size = 1 << 30, 1 << 40
    for name, member in (("text.tar", text), ("image.tar", image)):
        (tmp_path / name).write_bytes(tar(samples(0, 2))[:4096] + member.tobuf())
    listing = read(tmp_path)
    assert set(reasons(listing)) == {
        ("member", "it is too large"), ("shard", "it cannot be read to its end")
    }  # fmt: skip


@pytest.mark.parametrize("keep", [0, 100, 512, 3000, 4500])
def test_a_shard_that_is_cut_gives_what_is_whole(keep, tmp_path):
    whole = tar(samples(0, 4))
    (tmp_path / "a.tar").write_bytes(whole[:keep])
    (tmp_path / "b.tar").write_bytes(whole)
    listing = read(tmp_path)
    assert [k for k in found(listing) if k.startswith("b.tar")] == [
        f"b.tar/000{k}" for k in range(4)
    ]
    assert reasons(listing)[0] == ("shard", "it cannot be read to its end")


def test_splits_by_the_names_of_files(tmp_path):
    for split in ("train", "val"):
        (tmp_path / f"captions_{split}2017.json").write_text(json.dumps(coco(2)).replace(
            "00", f"{split}-00"))  # fmt: skip
    listing = read(tmp_path)
    splits = {name: entry.split for name, entry in listing.entries.items()}
    assert splits == {
        "train-000.png": "train", "train-001.png": "train", "val-000.png": "val",
        "val-001.png": "val",
    }  # fmt: skip
    assert listing.entries["val-000.png"].names == ("val-000.png", "val2017/val-000.png")


def test_a_folder_of_two_kinds_is_ambiguous(tmp_path):
    (tmp_path / "captions.txt").write_text(delimited(("image", "caption"), count=2))
    (tmp_path / "captions_all.json").write_text(json.dumps(coco(2)))
    with pytest.raises(ValueError, match=r"got captions_all.json, captions.txt in one folder"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("absent", FileNotFoundError, "got no such file or folder, expected captions_"),
        ("empty", ValueError, "got a folder with neither captions nor images"),
        ("a.tar.gz", ValueError, "got a compressed file, expected .*decompress it first"),
        ("notes.txt", ValueError, "got 'hello world' for a first line, expected captions_"),
        ("binary.bin", ValueError, "for a first line, expected captions_"),
    ],
)
def test_what_no_reader_fits_is_refused(name, error, message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "notes.txt").write_text("hello world\n")
    (tmp_path / "binary.bin").write_bytes(os.urandom(100) + b"\0\xff\n")
    with pytest.raises(error, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("format", FORMATS)
def test_damage_of_any_kind_is_counted_or_refused(format, tmp_path):
    """Bytes cut off, overwritten, doubled: a listing, or an error of one line."""
    path, _ = write(format, tmp_path)
    target = path if path.is_file() else min(f for f in path.iterdir() if f.suffix != ".png")
    whole, draw = target.read_bytes(), random.Random(0)
    for _ in range(40):
        content, start = bytearray(whole), draw.randrange(len(whole))
        stop = min(len(whole), start + draw.choice((1, 3, 40)))
        content[start:stop] = draw.choice((
            b"", draw.randbytes(stop - start), b'"', b"\0", b"\r", b"\t", b"{", b"[" * 2000,
            b"\xff" * (stop - start), whole[start:],
        ))  # fmt: skip
        target.write_bytes(content if draw.random() < 0.7 else content[:stop])
        message = "data x: got nothing, expected nothing"
        try:
            listing = read(path)
        except ValueError as error:
            message = str(error)
        else:
            texts = [text for entry in listing.entries.values() for text in entry.captions]
            assert all(isinstance(text, str) and text for text in texts)
            assert all(line.isprintable() for line in listing.skipped.lines())
        assert re.fullmatch(r"data .*: got .*, expected .*", message)
