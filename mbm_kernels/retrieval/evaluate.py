"""R@k of a model on the splits of a data set, beside its two baselines."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mbm_kernels.captioning.data import CaptionSet, WordTokenizer
from mbm_kernels.models import TwoTower
from mbm_kernels.retrieval.baselines import HistogramCCA
from mbm_kernels.retrieval.embed import embed_set
from mbm_kernels.retrieval.recall import Recalls, belonging, chance, recalls

Table = dict[str, dict[str, Recalls]]  # split -> method -> recalls


def evaluate(
    model: TwoTower,
    sets: dict[str, CaptionSet],
    tokenizer: WordTokenizer,
    splits: Sequence[str],
) -> Table:
    """The model, `colour_words_cca` fitted on the `train` of `sets`, and `chance`, by split."""
    return rate(
        {split: embed_set(model, sets[split], tokenizer) for split in splits}, sets, tokenizer
    )


def rate(
    embedded: dict[str, tuple[Tensor, Tensor]],
    sets: dict[str, CaptionSet],
    tokenizer: WordTokenizer,
) -> Table:
    """As `evaluate`, of the embeddings by `embed_set` of each split."""
    baseline = HistogramCCA(sets["train"], tokenizer)
    table: Table = {}
    for split, embeddings in embedded.items():
        found = sets[split]
        belongs = belonging(found)
        table[split] = {
            "two_tower": recalls(*embeddings, belongs),
            "colour_words_cca": recalls(*baseline.embed_set(found), belongs),
            "chance": chance(belongs),
        }
    return table


def as_text(table: Table) -> str:
    """One line a split, method and direction, in percent."""
    lines = []
    for split, methods in table.items():
        for method, found in methods.items():
            for way, values in found.items():
                shown = "  ".join(f"{name} {value:6.1%}" for name, value in values.items())
                lines.append(f"{split:13} {method:17} {way:14} {shown}")
    return "\n".join(lines)
