"""Captions to integers and back, by words or by BPE pieces, without loss."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mbm_kernels._core.files import write_atomic

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
# Han, kana and their extensions: no spaces between words, so that each character is one.
CJK = "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"


class WordTokenizer:
    """A `tokenizers` model of words or of pieces of them, in lower case.

    Words are split at whitespace and punctuation, and Chinese and Japanese ones by character.

    A word that follows a space carries U+2581 before it, punctuation stands alone, so decoding
    knows where the spaces were: "kiss: woman, man" is `▁kiss`, `:`, `▁woman`, `,`, `▁man`.
    Runs of whitespace count as one space.
    """

    pad_id = 0
    bos_id = 1
    eos_id = 2
    unk_id = 3

    def __init__(self, tokenizer: Tokenizer) -> None:
        got = [tokenizer.token_to_id(token) for token in SPECIALS]
        if got != [0, 1, 2, 3]:
            raise ValueError(
                f"WordTokenizer: got ids {got} for {' '.join(SPECIALS)}, expected [0, 1, 2, 3]; "
                "make the tokenizer with WordTokenizer.train"
            )
        self._tokenizer = tokenizer

    @classmethod
    def train(cls, captions: Iterable[str], *, pieces: int | None = None) -> WordTokenizer:
        """The words of the captions, most frequent first, ties by spelling.

        Args:
            pieces: instead of words, about so many pieces by byte pair encoding over characters:
                never fewer than there are characters.

        Raises:
            ValueError: there is no word in them, or `pieces` is not positive.
        """
        if pieces is not None and pieces < 1:
            raise ValueError(f"WordTokenizer.train: pieces: got {pieces}, expected at least 1")
        captions = [_lower(caption) for caption in captions]
        normalizer = normalizers.Sequence(
            [
                normalizers.Replace(Regex(r"\s+"), " "),
                normalizers.Strip(),
                normalizers.Lowercase(),
            ]
        )
        splits = [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Punctuation(behavior="isolated"),
        ]
        if any(re.search(CJK, caption) for caption in captions):
            splits.append(pre_tokenizers.Split(Regex(CJK), behavior="isolated"))
        pre_tokenizer = pre_tokenizers.Sequence(splits)
        words: Counter[str] = Counter()
        for caption in captions:
            found = pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(caption))
            words.update(word for word, _ in found)
        if not words:
            raise ValueError(
                "WordTokenizer.train: got captions without a word, expected at least one; "
                "pass the captions of the training split"
            )
        ordered = sorted(words, key=lambda word: (-words[word], word))
        vocab = {token: index for index, token in enumerate((*SPECIALS, *ordered))}
        # The specials are in the vocabulary but not "added tokens": no caption can spell one.
        tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=SPECIALS[3]))
        if pieces is not None:
            tokenizer = Tokenizer(_pieces(words, pieces))
        tokenizer.normalizer = normalizer
        tokenizer.pre_tokenizer = pre_tokenizer
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
        return cls(tokenizer)

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, caption: str) -> list[int]:
        """bos, the words, eos; a word never seen in training is unk_id."""
        return [self.bos_id, *self._tokenizer.encode(_lower(caption)).ids, self.eos_id]

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to the first eos, without special tokens.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        words: list[str] = []
        for index in ids:
            if index == self.eos_id:
                break
            token = self._tokenizer.id_to_token(index) if index >= 0 else None
            if token is None:
                raise ValueError(
                    f"WordTokenizer.decode: got id {index}, expected 0..{self.vocab_size - 1}; "
                    "decode with the tokenizer that the model was trained with"
                )
            if index > self.unk_id:
                words.append(token)
        return str(self._tokenizer.decoder.decode(words)) if words else ""

    def to_bytes(self) -> bytes:
        """The tokenizer as JSON."""
        return str(self._tokenizer.to_str(pretty=True)).encode()

    @classmethod
    def from_bytes(cls, content: bytes, source: str | Path) -> WordTokenizer:
        """What `to_bytes` gave; `source` names it in errors.

        Raises:
            ValueError: it is no tokenizer, or another kind of tokenizer.
        """
        try:
            tokenizer = Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises Exception itself
            raise ValueError(
                f"WordTokenizer.load: got {source}, which is no tokenizer file ({error}), "
                "expected what WordTokenizer.save wrote; train the tokenizer again"
            ) from error
        return cls(tokenizer)

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as JSON, atomically."""
        write_atomic(Path(path), self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> WordTokenizer:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no tokenizer, or another kind of tokenizer.
        """
        return cls.from_bytes(Path(path).read_bytes(), path)


def _lower(caption: str) -> str:
    """Python's lower case, which knows the final sigma; the library's does not."""
    return caption.lower()


def _pieces(words: Counter[str], size: int) -> models.BPE:
    """Byte pair encoding of words, the specials first in its vocabulary."""
    learner = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIALS) + size, special_tokens=list(SPECIALS), show_progress=False
    )
    ordered = sorted(words, key=lambda word: (-words[word], word))
    learner.train_from_iterator((word for word in ordered for _ in range(words[word])), trainer)
    learned = json.loads(learner.to_str())["model"]
    merges = [tuple(m if isinstance(m, list) else m.split(" ")) for m in learned["merges"]]
    return models.BPE(vocab=learned["vocab"], merges=merges, unk_token=SPECIALS[3])
