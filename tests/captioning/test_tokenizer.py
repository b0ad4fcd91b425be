"""The word tokenizer loses nothing of a caption of either data set."""

from __future__ import annotations

from pathlib import Path

import pytest

from mbm_kernels.captioning import data
from mbm_kernels.captioning.data import WordTokenizer

LABELS = [
    "kiss: woman, man, light skin tone, medium-dark skin tone",
    "woman\u2019s sandal",
    "eight o\u2019clock",
    "flag: côte d\u2019ivoire",
    "flag: st. kitts & nevis",
    "japanese “free of charge” button",
    "a button (blood type)",
    "keycap: #",
    "keycap: *",
    "up! button",
    "t-shirt",
    "1st place medal",
    "o.k.",
]


@pytest.fixture
def tokenizer() -> WordTokenizer:
    return WordTokenizer.train(LABELS)


@pytest.mark.parametrize("caption", LABELS)
def test_decode_inverts_encode(tokenizer: WordTokenizer, caption: str) -> None:
    ids = tokenizer.encode(caption)
    assert ids[0] == tokenizer.bos_id == 1
    assert ids[-1] == tokenizer.eos_id == 2
    assert tokenizer.unk_id not in ids
    assert tokenizer.decode(ids) == caption


def test_every_scene_caption_survives() -> None:
    sets = data.load("scenes", limit=1000)
    tokenizer = WordTokenizer.train(sets["train"].captions)
    # 4 specials, 7 of grammar, comma, 2 sizes, 8 colours, 5 shapes.
    assert tokenizer.vocab_size == 27
    for split in sets.values():
        for caption in split.captions:
            assert tokenizer.decode(tokenizer.encode(caption)) == caption


def test_words_are_shared_across_punctuation(tokenizer: WordTokenizer) -> None:
    words = tokenizer.encode("light, light: light")[1:-1]
    assert words[0] == words[2] == words[4]
    assert len(words) == 5


def test_case_and_whitespace_are_folded(tokenizer: WordTokenizer) -> None:
    assert tokenizer.encode("  Kiss:\tWOMAN,\n man ") == tokenizer.encode("kiss: woman, man")


def test_unknown_words_become_unk_and_decode_drops_them(tokenizer: WordTokenizer) -> None:
    ids = tokenizer.encode("kiss: zebra")
    assert ids.count(tokenizer.unk_id) == 1
    assert tokenizer.decode(ids) == "kiss:"


def test_decode_stops_at_eos_and_drops_padding(tokenizer: WordTokenizer) -> None:
    ids = tokenizer.encode("keycap: #")
    assert tokenizer.decode([*ids, 0, 0, *ids]) == "keycap: #"
    assert tokenizer.decode([0, 1, 3, 2]) == ""
    assert tokenizer.decode([]) == ""


def test_a_caption_cannot_spell_a_special_token() -> None:
    tokenizer = WordTokenizer.train(["a < b > c <eos> d"])
    ids = tokenizer.encode("a <eos> d")
    assert ids.index(tokenizer.eos_id) == len(ids) - 1
    assert tokenizer.decode(ids) == "a <eos> d"


def test_vocabulary_does_not_depend_on_the_order_of_captions() -> None:
    first, second = WordTokenizer.train(LABELS), WordTokenizer.train(LABELS[::-1])
    assert [first.encode(c) for c in LABELS] == [second.encode(c) for c in LABELS]


def test_save_and_load(tokenizer: WordTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    again = WordTokenizer.load(path)
    assert again.vocab_size == tokenizer.vocab_size
    for caption in LABELS:
        assert again.encode(caption) == tokenizer.encode(caption)
        assert again.decode(again.encode(caption)) == caption


def test_a_failed_save_leaves_the_old_file(
    tokenizer: WordTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    before = path.read_bytes()

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        WordTokenizer.train(["something else"]).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize("content", [b"", b"not json", b"\xff\xfe", b'{"version": "1.0"}'])
def test_a_corrupt_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"no tokenizer file .* expected what WordTokenizer.save"):
        WordTokenizer.load(path)


def test_a_foreign_tokenizer_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(path))
    with pytest.raises(ValueError, match=r"expected \[0, 1, 2, 3\]"):
        WordTokenizer.load(path)
    with pytest.raises(FileNotFoundError):
        WordTokenizer.load(tmp_path / "none.json")


def test_bad_ids_and_empty_captions_are_refused(tokenizer: WordTokenizer) -> None:
    for index in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=rf"got id {index}, expected 0\.\."):
            tokenizer.decode([index])
    with pytest.raises(ValueError, match="without a word"):
        WordTokenizer.train([" ", ""])


TEXTS = [
    "ΟΔΟΣ ΣΟΦΟΣ",
    "côte d\u2019ivoire",
    "北京の犬 runs",
    "ein großes Schloß",
    "👩‍🚀 in space",
    "a <pad> b",
]


@pytest.mark.parametrize("pieces", [None, 5, 60, 10_000])
def test_unicode_survives_by_words_and_by_pieces(pieces: int | None, tmp_path: Path) -> None:
    tokenizer = WordTokenizer.train(TEXTS, pieces=pieces)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = WordTokenizer.load(tmp_path / "tokenizer.json")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert loaded.encode(text) == ids
        assert loaded.decode(ids) == text.lower()
        assert min(ids[1:-1]) > tokenizer.unk_id
    assert tokenizer.encode(TEXTS[0]) == tokenizer.encode("οδος σοφος")
    assert tokenizer.vocab_size == loaded.vocab_size


def test_pieces_spell_words_never_seen() -> None:
    words = WordTokenizer.train(LABELS)
    pieces = WordTokenizer.train(LABELS, pieces=100)
    assert words.unk_id in words.encode("manbutton")
    assert pieces.unk_id not in pieces.encode("manbutton")
    assert pieces.decode(pieces.encode("manbutton")) == "manbutton"
    assert len(pieces.encode(LABELS[0])) < len(LABELS[0])
    assert pieces.to_bytes() == WordTokenizer.train(LABELS, pieces=100).to_bytes()


def test_chinese_words_are_characters() -> None:
    tokenizer = WordTokenizer.train(["北京的狗", "狗在北京"])
    assert tokenizer.unk_id not in tokenizer.encode("的狗在京")
    assert tokenizer.decode(tokenizer.encode("狗在京")) == "狗在京"


def test_pieces_are_positive() -> None:
    with pytest.raises(ValueError, match="pieces: got 0, expected at least 1"):
        WordTokenizer.train(LABELS, pieces=0)
