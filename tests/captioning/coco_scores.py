"""Scores of drawn cases by pycocoevalcap: `python -m tests.captioning.coco_scores` writes them.

It needs pycocoevalcap 1.2, of which only the scorers in Python are called; the tests need only what
it wrote.
"""

import json
import random
from importlib import metadata
from pathlib import Path

PATH = Path(__file__).with_name("coco_scores.json")
COUNT, SEED = 1000, 15
COLUMNS = ("bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider_d")
WORDS = (
    *("a", "the", "red", "blue", "small", "large", "star", "circle"),
    *("dog", "t-shirt", "on", "of", "left", "above", "two", "runs"),
)


def drawn(count=COUNT, seed=SEED):
    """Cases: predictions, and lists of references that share words and runs of words with them.

    Some predictions are empty, exact or repeat a word; a case has 1 to 6 images, each with 1 to 4
    references. Only `random()` is called, whose numbers are the same in every Python.
    """
    uniform = random.Random(seed).random

    def below(n):
        return int(uniform() * n)

    def caption(least=0):
        return [WORDS[below(len(WORDS))] for _ in range(least + below(12 - least))]

    def changed(words):
        kept = [w if uniform() < 0.8 else WORDS[below(len(WORDS))] for w in words]
        start = below(3) if uniform() < 0.3 else 0
        return kept[start:] + caption()[: below(3)]

    for _ in range(count):
        images = [[caption(1) for _ in range(1 + below(4))] for _ in range(1 + below(6))]
        said = [
            given[below(len(given))] if uniform() < 0.15 else changed(given[below(len(given))])
            for given in images
        ]
        yield [" ".join(x) for x in said], [[" ".join(x) for x in given] for given in images]


def published(predictions, references):
    """The package's scores, BLEU and ROUGE-L times 100."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    said = {k: [text] for k, text in enumerate(predictions)}
    given = dict(enumerate(references))
    bleu, _ = Bleu(4).compute_score(given, said, verbose=0)
    rouge, _ = Rouge().compute_score(given, said)
    cider, _ = Cider().compute_score(given, said)
    return [*(100 * x for x in bleu), 100 * rouge, cider]


def main():
    rows = [[round(float(x), 9) for x in published(*case)] for case in drawn()]
    head = {"package": f"pycocoevalcap {metadata.version('pycocoevalcap')}", "columns": COLUMNS}
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    PATH.write_text(json.dumps(head)[:-1] + ', "scores": [\n' + lines + "\n]}\n")


if __name__ == "__main__":
    main()
