"""Small data sets in each format that the readers know, written from the same images."""

import csv
import io
import json
import tarfile

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
COUNT = 30


def names(count=COUNT):
    return [f"{k:03d}.png" for k in range(count)]


def captions(k):
    """Two, in the colour of image k."""
    colour = list(COLOURS)[k % len(COLOURS)]
    return [f"A {colour} square", f"the {colour} one, number {k}"]


def image_bytes(k, kind="PNG"):
    """A square of one colour; no two are the same."""
    pixels = np.full((20, 20, 3), list(COLOURS.values())[k % len(COLOURS)], np.uint8)
    pixels[k % 20, k // 20] = 255
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def write_images(folder, count=COUNT):
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names(count)):
        (folder / name).write_bytes(image_bytes(k))
    return folder


def coco(count=COUNT):
    return {
        "images": [{"id": k, "file_name": name} for k, name in enumerate(names(count))],
        "annotations": [
            {"id": 2 * k + i, "image_id": k, "caption": text}
            for k in range(count)
            for i, text in enumerate(captions(k))
        ],
    }


def karpathy(count=COUNT):
    def split(k):
        return ("train", "restval", "val", "test")[k % 4]

    return {
        "dataset": "coco",
        "images": [
            {
                "filename": name,
                "filepath": "val2014",
                "split": split(k),
                "sentences": [{"raw": text, "tokens": text.split()} for text in captions(k)],
            }
            for k, name in enumerate(names(count))
        ],
    }


def rows(count=COUNT):
    return [(name, text) for k, name in enumerate(names(count)) for text in captions(k)]


def delimited(header, delimiter=",", count=COUNT):
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator="\n")
    writer.writerows([header, *rows(count)])
    return out.getvalue()


def tar(members):
    """Bytes of a tar file of (name, content)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def samples(start, stop):
    for k in range(start, stop):
        yield f"{k:04d}.png", image_bytes(k)
        yield f"{k:04d}.txt", "\n".join(captions(k)).encode()


def write(format, root):
    """A data set of 30 images with two captions each in a format; (data, images or None)."""
    images = write_images(root / "images")
    path = {
        "coco": root / "captions_all.json",
        "karpathy": root / "dataset_coco.json",
        "flickr": root / "captions.txt",
        "token": root / "Flickr8k.token.txt",
        "csv": root / "table.csv",
        "tsv": root / "table.tsv",
        "jsonl": root / "table.jsonl",
        "list": root / "table.json",
    }.get(format)
    if format == "folder":
        for k, name in enumerate(names()):
            (images / name).with_suffix(".txt").write_text("\n".join(captions(k)))
        return images, None
    if format == "webdataset":
        shards = root / "shards"
        shards.mkdir()
        for start in (0, 15):
            path = shards / f"{start:05d}.tar"
            path.write_bytes(tar(samples(start, start + 15)))
        return shards, None
    objects = [{"image": name, "caption": captions(k)} for k, name in enumerate(names())]
    text = {
        "coco": lambda: json.dumps(coco()),
        "karpathy": lambda: json.dumps(karpathy()),
        "flickr": lambda: delimited(("image", "caption")),
        "token": lambda: "".join(f"{n}#{i % 2}\t{t}\n" for i, (n, t) in enumerate(rows())),
        "csv": lambda: delimited(("File_Name", "Text"), ";"),
        "tsv": lambda: delimited(("filepath", "sentence"), "\t"),
        "jsonl": lambda: "".join(json.dumps(row) + "\n" for row in objects),
        "list": lambda: json.dumps(objects),
    }[format]()
    path.write_text(text, encoding="utf-8")
    return path, images


FORMATS = (
    "coco", "karpathy", "flickr", "token", "csv", "tsv", "jsonl", "list", "folder", "webdataset",
)  # fmt: skip


def reasons(listing):
    """(kind, why) of what was skipped."""
    return [(row.kind, row.why) for row in listing.skipped.rows]
