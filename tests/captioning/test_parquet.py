"""The parquet reader: on pyarrow where it is installed, else on a stand-in for its three calls."""

import sys
import types

import pytest

from mbm_kernels.captioning.data.readers import contents, read

from .own_helpers import captions, image_bytes, reasons


def table(count, split=None):
    rows = [
        {"Image": {"bytes": image_bytes(k), "path": f"{k}.png"}, "text": captions(k), "label": k}
        for k in range(count)
    ]
    rows[1]["Image"] = {"bytes": None, "path": "elsewhere.png"}
    rows[2]["text"] = None
    return [row | {"split": split} if split else row for row in rows]


@pytest.fixture
def stand_in(monkeypatch):
    """Files of this name hold these rows."""
    held = {}

    class ParquetFile:
        def __init__(self, path):
            if path.name not in held:
                raise ValueError("no parquet magic bytes")  # as ArrowInvalid
            self.rows = held[path.name]
            self.schema_arrow = types.SimpleNamespace(names=list(self.rows[0]))

        def iter_batches(self, batch_size, columns):
            for start in range(0, len(self.rows), batch_size):
                part = [
                    {c: row[c] for c in columns} for row in self.rows[start : start + batch_size]
                ]
                yield types.SimpleNamespace(to_pylist=lambda part=part: part)

    parquet = types.ModuleType("pyarrow.parquet")
    parquet.ParquetFile = ParquetFile
    package = types.ModuleType("pyarrow")
    package.parquet = parquet
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)

    def put(path, rows):
        path.write_bytes(b"stand-in")
        held[path.name] = rows

    return put


@pytest.fixture
def real():
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    return lambda path, rows: parquet.write_table(arrow.Table.from_pylist(rows), path)


@pytest.fixture(params=["stand_in", "real"])
def put(request):
    return request.getfixturevalue(request.param)


def test_rows_of_bytes_and_texts(put, tmp_path):
    put(tmp_path / "train-00000-of-00001.parquet", table(70))
    put(tmp_path / "validation-00000-of-00001.parquet", table(3))
    (tmp_path / "zz.parquet").write_bytes(b"no parquet")
    listing = read(tmp_path)
    entries = list(listing.entries.values())
    assert [entry.split for entry in entries] == ["train"] * 70 + ["val"] * 3
    assert entries[69].captions == [text.lower() for text in captions(69)]
    assert reasons(listing) == [("caption", "it is no text")] * 2 + [("shard", "it cannot be read")]
    assert dict(contents(entries[0].shard, [0, 1, 69])) == {
        0: image_bytes(0), 1: b"", 69: image_bytes(69)
    }  # fmt: skip
    with pytest.raises(ValueError, match="it changed since it was scanned"):
        list(contents(entries[0].shard, [70]))


def test_a_split_column_is_kept(put, tmp_path):
    put(tmp_path / "data.parquet", table(3, "test"))
    assert {entry.split for entry in read(tmp_path / "data.parquet").entries.values()} == {"test"}


def test_columns_that_do_not_tell(put, tmp_path):
    put(tmp_path / "data.parquet", [{"label": 3, "picture": b""}])
    with pytest.raises(ValueError, match="got the columns label, picture, expected one for the"):
        read(tmp_path / "data.parquet")


def test_without_pyarrow_the_error_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match="got a parquet file but no pyarrow, expected"):
        read(tmp_path / "data.parquet")
