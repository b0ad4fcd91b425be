"""Tiny Debian packages with the files that tuxpaint and fashion are made from."""

import gzip
import io
import tarfile

import numpy as np

from mbm_kernels.captioning.data import fashion

from .own_helpers import image_bytes

COUNTS = {"train": ("train", 12), "test": ("t10k", 10)}
STAMPS = "usr/share/tuxpaint/stamps"
MNIST = "usr/share/datasets/fashion-mnist"


def data_tar(files, mode="w:xz", extra=()):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for member in extra:
            archive.addfile(member)
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def deb(path, tar):
    """An ar archive as dpkg-deb writes it."""
    with path.open("wb") as file:
        file.write(b"!<arch>\n")
        members = (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", tar))
        for name, content in members:
            file.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode())
            file.write(content + b"\n" * (len(content) % 2))
    return path


def stamps():
    files = {f"{STAMPS}/a/x{k}.png": image_bytes(k) for k in range(4)}
    files |= {f"{STAMPS}/a/x{k}.txt": f"Thing {k}.\nde.utf8=Ding".encode() for k in range(3)}
    files[f"{STAMPS}/a/x0_mirror.png"] = image_bytes(9)
    files[f"{STAMPS}/v1.5.png"], files[f"{STAMPS}/v1.5.txt"] = (
        image_bytes(5),
        b"Half \xe2\x82\xac.\n",
    )
    files[f"{STAMPS}/empty.png"], files[f"{STAMPS}/empty.txt"] = image_bytes(6), b"\nde.utf8=x"
    return files | {"usr/share/doc/other.txt": b"no", f"{STAMPS}/a/x0.ogg": b"sound"}


def idx(values, shape):
    header = np.array([fashion.MAGIC[len(shape)], *shape], ">u4").tobytes()
    return gzip.compress(header + np.asarray(values, np.uint8).tobytes())


def photographs(train=12, test=10):
    files = {}
    for prefix, count in (("train", train), ("t10k", test)):
        pixels = np.arange(count)[:, None, None] + np.zeros((28, 28))
        files[f"{MNIST}/{prefix}-images-idx3-ubyte.gz"] = idx(pixels, (count, 28, 28))
        files[f"{MNIST}/{prefix}-labels-idx1-ubyte.gz"] = idx(np.arange(count) % 10, (count,))
    return files
