"""The demo's part beside captions: two towers that find images, a head that judges pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mbm_kernels.captioning.checkpoint import remove
from mbm_kernels.captioning.data import CaptionSet, collate
from mbm_kernels.demo.results import Demo, Query, spread
from mbm_kernels.demo.subjects import MatchingSubject, Subject, TowersSubject
from mbm_kernels.retrieval import matching
from mbm_kernels.retrieval.embed import embed_set
from mbm_kernels.retrieval.evaluate import rate
from mbm_kernels.retrieval.presets import Preset
from mbm_kernels.retrieval.train import fresh_two_tower, train_two_tower

QUERIES, FOUND = 4, 5


@dataclass(frozen=True)
class Subjects:
    """What is timed of the two models."""

    towers: Subject
    matching: Subject

    @classmethod
    def of(cls, demo: Demo, chosen: Preset) -> Subjects:
        """Of the models before their first step."""
        train, words = demo.sets["train"], demo.tokenizer
        towers = fresh_two_tower(train, words, chosen.config, "stock", demo.seed)
        pairs = matching.fresh_matching(train, words, None, "stock", demo.seed)
        shown = demo.sets[demo.splits[0]]

        def batch(rows: int) -> Any:
            return collate(shown, range(min(rows, len(shown))), words)[:2]

        return cls(
            TowersSubject("two towers", towers.settings, *batch(chosen.settings.batch_size)),
            MatchingSubject(
                "four-stream model", pairs.settings, *batch(chosen.matching.batch_size)
            ),
        )


def train(
    demo: Demo, chosen: Preset, subjects: Subjects, out: Path, steps: int | None
) -> list[Subject]:
    """Trains and scores both models; returns what to time of them."""
    words, sets = demo.tokenizer, demo.sets
    steps = steps or chosen.demo_steps
    settings = {
        name: replace(whole, batch_size=min(whole.batch_size, len(sets["train"]))).shortened(steps)
        for name, whole in (("two_towers", chosen.settings), ("matching", chosen.matching))
    }
    for name in settings:
        remove(out / "models" / name)
    towers, demo.histories["two_towers"] = train_two_tower(
        sets["train"],
        words,
        settings["two_towers"],
        config=chosen.config,
        run=out / "models" / "two_towers",
        seed=demo.seed,
    )
    embedded = {split: embed_set(towers, sets[split], words) for split in demo.splits}
    demo.recalls = rate(embedded, sets, words)
    demo.queries = {split: _queries(sets[split], *found) for split, found in embedded.items()}
    pairs, demo.histories["matching"] = matching.train_matching(
        sets["train"],
        words,
        settings["matching"],
        run=out / "models" / "matching",
        seed=demo.seed,
    )
    swap = matching.swap_of(sets["train"], words)
    demo.aucs = {
        split: matching.ablations(pairs, sets[split], words, swap) for split in demo.splits
    }
    for name, model in (("two_towers", towers), ("matching", pairs)):
        demo.parameters[name] = sum(p.numel() for p in model.parameters())
    return [subjects.towers.of(towers), subjects.matching.of(pairs)]


def _queries(captions: CaptionSet, images: Tensor, texts: Tensor) -> list[Query]:
    """Some captions and the images nearest to each, by the embeddings of all."""
    rows = spread(len(captions), QUERIES)
    scores = texts[list(rows)] @ images.T
    best = scores.topk(min(FOUND, images.size(0)), dim=1)
    owner = captions.image_of
    captions_of: dict[int, str] = {}
    for n, caption in enumerate(captions.captions):
        captions_of.setdefault(n if owner is None else int(owner[n]), caption)
    return [
        Query(captions.captions[row], [(i, captions_of[i]) for i in found])
        for row, found in zip(rows, best.indices.tolist(), strict=True)
    ]
