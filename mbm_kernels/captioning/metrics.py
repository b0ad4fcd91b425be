"""How good captions are, and two baselines that look at no model."""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import sacrebleu
import torch

from mbm_kernels.captioning.data import CaptionSet
from mbm_kernels.captioning.data.tokenizer import CJK

References = Sequence[str | Sequence[str]]

MAX_ORDER = 4  # n-grams of 1 to 4 words
TINY, SMALL = 1e-15, 1e-9  # added to BLEU's numerators and denominators
BETA = 1.2  # of ROUGE-L: how much more recall weighs than precision
SIGMA = 6.0  # of CIDEr-D's penalty on the difference in length, in words

# As the PTB tokenizer that coco-caption scores with: punctuation is no word, "t-shirt" is one.
_WORD = re.compile(r"\w+(?:[-'\u2019.]\w+)*|[#*&+%$@]")

Ngram = tuple[str, ...]


def _spaced(text: str) -> str:
    """With spaces around each Chinese and Japanese character, which counts as a word."""
    return re.sub(CJK, r" \g<0> ", text)


def _checked(predictions: Sequence[str], references: References) -> list[list[str]]:
    if isinstance(predictions, str) or isinstance(references, str):
        raise ValueError(
            "metrics: got a single string, expected a list of captions; wrap it in a list"
        )
    if len(predictions) == 0 or len(predictions) != len(references):
        raise ValueError(
            f"metrics: got {len(predictions)} predictions and {len(references)} references, "
            "expected as many of each and at least one; score one whole split"
        )
    lists = [[given] if isinstance(given, str) else list(given) for given in references]
    empty = [index for index, given in enumerate(lists) if not given]
    if empty:
        raise ValueError(
            f"metrics: references[{empty[0]}]: got an empty list, expected at least one caption; "
            "leave pictures without a caption out"
        )
    return lists


def score(predictions: Sequence[str], references: References) -> dict[str, float]:
    """All metrics of one split.

    Args:
        predictions: N captions.
        references: N captions, or N lists of captions.

    Returns:
        `exact_match` 0..1; `bleu1` to `bleu4` and `rouge_l` 0..100; `cider_d` 0..10.

    Raises:
        ValueError: no caption, lists of different length, or an image without a reference.
    """
    by_order = bleu(predictions, references)
    return {
        "exact_match": exact_match(predictions, references),
        **{f"bleu{order}": value for order, value in enumerate(by_order, 1)},
        "rouge_l": rouge_l(predictions, references),
        "cider_d": cider_d(predictions, references),
    }


def exact_match(predictions: Sequence[str], references: References) -> float:
    """Share of predictions equal to one of their references, 0..1; case and spacing are folded."""
    lists = _checked(predictions, references)

    def fold(text: str) -> str:
        return " ".join(text.lower().split())

    hits = (
        fold(prediction) in map(fold, given)
        for prediction, given in zip(predictions, lists, strict=True)
    )
    return sum(hits) / len(lists)


def bleu(predictions: Sequence[str], references: References) -> tuple[float, ...]:
    """Corpus BLEU of up to 1, 2, 3 and 4 words, 0..100 each, with the closest reference length.

    Nothing is smoothed but division by zero, so an order without a match gives 0 to 3 places.

    Source: Papineni, Roukos, Ward, Zhu, "BLEU: a method for automatic evaluation of machine
    translation", ACL 2002; the values are those of coco-caption's scorer times 100.
    """
    lists = [
        [" ".join(_words(one)) for one in given] for given in _checked(predictions, references)
    ]
    most = max(map(len, lists))
    # None stands for "no k-th reference", which sacrebleu's annotation does not know.
    streams: Any = [[given[k] if k < len(given) else None for given in lists] for k in range(most)]
    said = [" ".join(_words(one)) for one in predictions]
    found = sacrebleu.corpus_bleu(said, streams, tokenize="none", smooth_method="none", force=True)
    ratio = (found.sys_len + TINY) / (found.ref_len + SMALL)
    brevity = math.exp(min(0.0, 1 - 1 / ratio))
    precisions = [
        (matched + TINY) / (total + SMALL)
        for matched, total in zip(found.counts, found.totals, strict=True)
    ]
    products = itertools.accumulate(precisions, operator.mul)
    return tuple(100 * brevity * x ** (1 / order) for order, x in enumerate(products, 1))


def rouge_l(predictions: Sequence[str], references: References) -> float:
    """Mean ROUGE-L of the captions, 0..100.

    The F-measure, with recall weighted by beta = 1.2, of the longest common subsequence of words:
    the best precision and the best recall over an image's references, perhaps of two of them.

    Source: Lin, "ROUGE: a package for automatic evaluation of summaries", ACL workshop 2004; the
    values are those of coco-caption's scorer times 100, where no words are one empty word.
    """
    lists = _checked(predictions, references)
    total = 0.0
    for prediction, given in zip(predictions, lists, strict=True):
        said = _words(prediction) or [""]
        truths = [_words(reference) or [""] for reference in given]
        common = [_common_length(said, truth) for truth in truths]
        precision = max(common) / len(said)
        recall = max(length / len(truth) for length, truth in zip(common, truths, strict=True))
        if precision > 0:
            total += (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)
    return 100 * total / len(lists)


def _common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    best = [0] * (len(second) + 1)
    for word in first:
        before = 0  # what the row above has one place to the left
        for place, other in enumerate(second, 1):
            above = best[place]
            best[place] = before + 1 if word == other else max(above, best[place - 1])
            before = above
    return best[-1]


def _words(caption: str) -> list[str]:
    return _WORD.findall(_spaced(caption.lower()))


def _ngrams(caption: str) -> Counter[Ngram]:
    words = _words(caption)
    return Counter(
        tuple(words[start : start + order])
        for order in range(1, MAX_ORDER + 1)
        for start in range(len(words) - order + 1)
    )


def cider_d(predictions: Sequence[str], references: References) -> float:
    """Mean CIDEr-D of the captions, 0..10.

    For each order n the cosine of the tf-idf vectors of prediction and reference, the prediction's
    weights clipped to the reference's, times exp(-(difference in length)^2 / (2 sigma^2)); the mean
    over n = 1..4 and over references, times 10. The document frequencies are those of the given
    references, one document per image, so a corpus of one image scores 0, and so does an n-gram
    that every image has. A caption of fewer than 4 words has no 4-grams: it stays below 10 even
    where it is exact (one word: 2.5 at most).

    Source: Vedantam, Zitnick, Parikh, "CIDEr: Consensus-based image description evaluation", CVPR
    2015, section 4 and 5 (CIDEr-D); the values are those of coco-caption's scorer.
    """
    lists = _checked(predictions, references)
    cooked = [[_ngrams(reference) for reference in given] for given in lists]
    frequency = Counter(ngram for given in cooked for ngram in set().union(*given))
    log_documents = math.log(len(lists))

    def weigh(counts: Counter[Ngram]) -> tuple[list[dict[Ngram, float]], list[float], int]:
        vectors: list[dict[Ngram, float]] = [{} for _ in range(MAX_ORDER)]
        for ngram, count in counts.items():
            idf = log_documents - math.log(max(1, frequency[ngram]))
            vectors[len(ngram) - 1][ngram] = count * idf
        norms = [math.sqrt(sum(w * w for w in vector.values())) for vector in vectors]
        # As in coco-caption a caption's length is its number of 2-grams.
        length = sum(count for ngram, count in counts.items() if len(ngram) == 2)
        return vectors, norms, length

    total = 0.0
    for prediction, given in zip(predictions, cooked, strict=True):
        vectors, norms, length = weigh(_ngrams(prediction))
        similarity = 0.0
        for reference in given:
            ref_vectors, ref_norms, ref_length = weigh(reference)
            penalty = math.exp(-((length - ref_length) ** 2) / (2 * SIGMA**2))
            for vector, norm, ref_vector, ref_norm in zip(
                vectors, norms, ref_vectors, ref_norms, strict=True
            ):
                if norm == 0 or ref_norm == 0:
                    continue
                dot = sum(
                    min(w, ref_vector.get(g, 0.0)) * ref_vector.get(g, 0.0)
                    for g, w in vector.items()
                )
                similarity += penalty * dot / (norm * ref_norm)
        total += 10 * similarity / (MAX_ORDER * len(given))
    return total / len(lists)


def most_frequent_caption(train: CaptionSet | Sequence[str]) -> str:
    """The commonest caption of a training set, the first by spelling among equals.

    Raises:
        ValueError: the set is empty.
    """
    captions = train.captions if isinstance(train, CaptionSet) else train
    if len(captions) == 0:
        raise ValueError(
            "most_frequent_caption: got no caption, expected a training set; load one first"
        )
    counts = Counter(captions)
    return min(counts, key=lambda caption: (-counts[caption], caption))


def nearest_image_captions(train: CaptionSet, query_images: torch.Tensor) -> list[str]:
    """For each image the first caption of the nearest training image: least sum of squared
    differences over pixels and channels, the first in the set among equals.

    Args:
        train: N images.
        query_images: uint8 `[M, 3, Y, X]`, of the same size.

    Returns:
        M captions. Needs about 100 MB beside the images, whatever N and M are.

    Raises:
        ValueError: an empty training set, or images of another size or dtype.
    """
    if len(train) == 0:
        raise ValueError(
            "nearest_image_captions: got an empty training set, expected pictures; load one first"
        )
    if query_images.dtype != torch.uint8 or query_images.shape[1:] != train.images.shape[1:]:
        raise ValueError(
            f"nearest_image_captions: got query {query_images.dtype} {list(query_images.shape)}, "
            f"expected torch.uint8 [M, {', '.join(map(str, train.images.shape[1:]))}]; "
            "pass the raw pictures of the same data set"
        )
    nearest: list[int] = []
    for start in range(0, len(query_images), 256):
        nearest += _nearest(train.images, query_images[start : start + 256])
    references = train.references
    return [references[index][0] for index in nearest]


def _nearest(images: torch.Tensor, queries: torch.Tensor, chunk: int = 512) -> list[int]:
    """Index of the nearest image of each query: float32 products propose 8, integers decide."""

    def flat(pictures: torch.Tensor) -> torch.Tensor:
        return pictures.flatten(1).to(torch.float32).sub_(127.5)

    q = flat(queries)
    best = torch.full((len(q), 0), 0.0)
    where = torch.full((len(q), 0), 0, dtype=torch.int64)
    for start in range(0, len(images), chunk):
        t = flat(images[start : start + chunk])
        # |q - t|^2 less |q|^2, which is the same for every t.
        distance = torch.addmm((t * t).sum(1), q, t.T, beta=1, alpha=-2)
        index = torch.arange(start, start + len(t)).expand(len(q), -1)
        best, where = torch.cat([best, distance], 1), torch.cat([where, index], 1)
        best, order = best.topk(min(8, best.shape[1]), largest=False)
        where = where.gather(1, order)
    where = where.sort(dim=1).values
    out: list[int] = []
    for query, candidates in zip(queries, where, strict=True):
        gap = images[candidates].flatten(1).to(torch.int32) - query.flatten().to(torch.int32)
        exact = (gap * gap).sum(1, dtype=torch.int64)
        out.append(int(candidates[int(exact.argmin())]))
    return out
