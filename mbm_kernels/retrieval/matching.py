"""Whether an image and a text belong together: training and AUC of the similarity head.

The streams are the image, the words and the image's colours. Half of the wrong texts are those of
other images; the other half are hard, the right text with one word exchanged for another of its
class: another colour, shape, size or side.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_kernels.captioning.data import CaptionSet, WordTokenizer, collate
from mbm_kernels.captioning.execution import HERE, Execution
from mbm_kernels.captioning.fit import History, fit
from mbm_kernels.captioning.objective import Loss, Objective
from mbm_kernels.captioning.presets import TrainSettings
from mbm_kernels.captioning.prior import word_classes
from mbm_kernels.captioning.seeding import seeded
from mbm_kernels.captioning.streams import color_histograms, fresh_model, subsets_of, text_lengths
from mbm_kernels.models import MultimodalBigModel, MultimodalConfig

BATCH = 128
STREAMS = ("image", "words", "color")
# What a step trains on, and how often: a subset that is asked for later must have been trained.
SUBSETS = {
    ("image", "words", "color"): 0.5,
    ("image", "words"): 0.2,
    ("words", "color"): 0.2,
    ("words",): 0.1,
}
NEGATIVES = ("hard", "other")

Aucs = dict[str, dict[str, float]]  # streams joined by + -> negatives -> 0..1


class WordSwap:
    """Texts with one word exchanged for another of its class."""

    def __init__(self, captions: Sequence[list[int]], tokenizer: WordTokenizer) -> None:
        """`captions`: of training, as token ids, which tell the classes."""
        classes = word_classes(captions, tokenizer.vocab_size)
        self.others: dict[int, Tensor] = {}  # of a word, the others of its class
        for word in range(tokenizer.unk_id + 1, tokenizer.vocab_size):
            same = (classes == classes[word]).nonzero().flatten()
            same = same[(same > tokenizer.unk_id) & (same != word)]
            if len(same):
                self.others[word] = same

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Changed tokens [B, T], and whether a row could be changed, bool [B].

        The word and what it becomes are drawn from torch's generator.
        """
        changed, could = tokens.clone(), torch.zeros(len(tokens), dtype=torch.bool)
        for row, words in enumerate(tokens.tolist()):
            places = [place for place, word in enumerate(words) if word in self.others]
            if not places:
                continue
            place = places[int(torch.randint(len(places), ()))]
            others = self.others[words[place]]
            changed[row, place] = others[torch.randint(len(others), ())]
            could[row] = True
        return changed, could


class MatchingObjective(Objective):
    """Binary cross-entropy of each image with its own text and with a wrong one."""

    def __init__(self, model: MultimodalBigModel, swap: WordSwap) -> None:
        super().__init__()
        self.model: MultimodalBigModel = model
        self.swap = swap
        self.subsets = subsets_of(model, SUBSETS)

    def forward(self, images: Tensor, tokens: Tensor, inputs: Tensor | None = None) -> Loss:
        """Loss of images [B, 3, Y, X] and tokens [B, T + 1]; ``inputs`` is [B, T]."""
        subset = next(iter(self.subsets))  # all
        if self.training:
            chosen = torch.multinomial(torch.tensor(list(self.subsets.values())), 1)
            subset = list(self.subsets)[int(chosen)]
        wrong, could = self.swap(tokens)
        other = ~could | (torch.arange(len(tokens)) % 2 == 1)
        wrong = torch.where(other[:, None], tokens.roll(1, dims=0), wrong)
        same = (wrong == tokens).all(dim=1)  # another image may have the same text
        if inputs is not None:
            tokens = torch.cat([inputs, tokens[:, -1:]], dim=1)
        logits = pair_logits(self.model, images, [tokens, wrong], subset)  # [2, B]
        return Loss(pair_loss(logits[0], logits[1][~same]), {})


def pair_loss(right: Tensor, wrong: Tensor) -> Tensor:
    """Mean binary cross-entropy of logits [N] of right pairs and [M] of wrong ones."""
    return torch.cat([F.softplus(-right), F.softplus(wrong)]).mean()


def pair_logits(
    model: MultimodalBigModel, images: Tensor, texts: Sequence[Tensor], streams: Sequence[str]
) -> Tensor:
    """Logits [K, B] of images [B, 3, Y, X] in -1..1 with each of K texts [B, T].

    streams: which of the model's the score is made of.
    """
    seen: dict[str, Tensor] = {}
    if "image" in streams:
        seen["image"] = images
    if "color" in streams:
        pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        seen["color"] = color_histograms(pixels, model.config.color_bins).sqrt()
    encodings = model.encode(seen, {}) if seen else {}
    encodings = {stream: x.repeat(len(texts), 1) for stream, x in encodings.items()}
    if "words" in streams:
        words = torch.cat(list(texts))
        lengths = text_lengths(words, model.config.pad_id)
        encodings |= model.encode({"words": words}, {"words": lengths})
    return model.similarity(model.joint(encodings)).view(len(texts), len(images))


def train_matching(
    train_set: CaptionSet,
    tokenizer: WordTokenizer,
    settings: TrainSettings,
    *,
    config: MultimodalConfig | None = None,
    layers: str = "mbm",
    seed: int = 0,
    validation: CaptionSet | None = None,
    run: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    execution: Execution = HERE,
) -> tuple[MultimodalBigModel, History]:
    """Train a similarity head and the streams below it; see `captioning.fit.fit`.

    Args:
        config: the sizes; vocabulary, padding and the image's side are the data's.

    Returns:
        The model after its last step, in eval mode, and its losses by step.
    """
    model = fresh_matching(train_set, tokenizer, config, layers, seed)
    history = fit(
        MatchingObjective(model, swap_of(train_set, tokenizer)),
        train_set,
        tokenizer,
        settings,
        seed=seed,
        validation=validation,
        run=run,
        resume=resume,
        title="similarity head" if progress else None,
        execution=execution,
    )
    return model.eval(), history


def fresh_matching(
    train_set: CaptionSet,
    tokenizer: WordTokenizer,
    config: MultimodalConfig | None,
    layers: str,
    seed: int,
) -> MultimodalBigModel:
    """The model before its first step; without a configuration, of the streams of STREAMS."""
    config = config or MultimodalConfig(streams=STREAMS, vocab_size=tokenizer.vocab_size)
    return fresh_model(train_set, tokenizer, config, layers, seed)


def swap_of(train_set: CaptionSet, tokenizer: WordTokenizer) -> WordSwap:
    return WordSwap([tokenizer.encode(caption) for caption in train_set.captions], tokenizer)


@torch.no_grad()
def ablations(
    model: MultimodalBigModel, captions: CaptionSet, tokenizer: WordTokenizer, swap: WordSwap
) -> Aucs:
    """AUC of right against wrong texts for every set of streams that a step trains on.

    hard: against the text with one word exchanged; other: against that of another image.
    """
    logits: dict[tuple[str, ...], list[Tensor]] = {
        subset: [] for subset in subsets_of(model, SUBSETS)
    }
    usable: list[Tensor] = []
    with seeded(0, 0):
        for start in range(0, len(captions), BATCH):
            rows = range(start, min(start + BATCH, len(captions)))
            images, tokens, _ = collate(captions, rows, tokenizer)
            hard, could = swap(tokens)
            other = tokens.roll(1, dims=0)
            usable.append(torch.stack([could, (other != tokens).any(dim=1)]))
            for subset, found in logits.items():
                found.append(pair_logits(model, images, [tokens, hard, other], subset))
    kept = torch.cat(usable, dim=1)
    table: Aucs = {}
    for subset, parts in logits.items():
        right, *wrong = torch.cat(parts, dim=1)
        table["+".join(subset)] = {
            name: auc(right[keep], scores[keep])
            for name, scores, keep in zip(NEGATIVES, wrong, kept, strict=True)
        }
    return table


def auc(right: Tensor, wrong: Tensor) -> float:
    """The share of pairs of one of each in which the right one scores higher; ties count half."""
    if not len(right) or not len(wrong):
        return float("nan")
    below = np.sort(wrong.double().numpy())
    scores = right.double().numpy()
    less, no_more = np.searchsorted(below, scores, "left"), np.searchsorted(below, scores, "right")
    return float((less + no_more).mean() / (2 * len(below)))


def as_text(tables: dict[str, Aucs]) -> str:
    """One line a split and set of streams."""
    return "\n".join(
        f"{split:13} {streams:18} "
        + "  ".join(f"AUC {name} {value:.3f}" for name, value in found.items())
        for split, table in tables.items()
        for streams, found in table.items()
    )
