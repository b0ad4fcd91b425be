"""Retrieval without learning to see: colour histograms and word counts, joined by CCA.

Canonical correlation analysis finds the directions of the two that vary together (Hotelling,
"Relations between two sets of variates", 1936; for images and text: Hardoon, Szedmak and
Shawe-Taylor, "Canonical correlation analysis: an overview with application to learning methods",
2004).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mbm_kernels.captioning.data import CaptionSet, WordTokenizer
from mbm_kernels.captioning.streams import color_histograms

RIDGE = 1e-2  # of the mean variance, added to both covariances
MOST_DIRECTIONS = 64

Floats = npt.NDArray[np.float64]


class TfIdf:
    """Counts of a caption's words, the rarer in training the heavier, of length 1."""

    def __init__(self, captions: Sequence[str], tokenizer: WordTokenizer) -> None:
        self.tokenizer = tokenizer
        documents = (self._counts(captions) > 0).sum(axis=0)
        self.weights = np.log((1 + len(captions)) / (1 + documents)) + 1

    def __call__(self, captions: Sequence[str]) -> Floats:
        """float64 [N, V]."""
        weighted = self._counts(captions) * self.weights
        return weighted / np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-12)

    def _counts(self, captions: Sequence[str]) -> Floats:
        counts = np.zeros((len(captions), self.tokenizer.vocab_size))
        for row, caption in enumerate(captions):
            np.add.at(counts[row], self.tokenizer.encode(caption)[1:-1], 1)
        return counts


@dataclass(frozen=True)
class CCA:
    """Projections of two views onto their canonical directions, each times its correlation."""

    means: tuple[Floats, Floats]
    projections: tuple[Floats, Floats]

    @classmethod
    def fit(cls, x: Floats, y: Floats, ridge: float = RIDGE) -> CCA:
        """Of rows x [N, P] and y [N, R] that belong together."""
        means = x.mean(axis=0), y.mean(axis=0)
        x, y = x - means[0], y - means[1]
        whiten = [_inverse_root(v.T @ v / len(v), ridge) for v in (x, y)]
        u, correlation, vt = np.linalg.svd(whiten[0] @ (x.T @ y / len(x)) @ whiten[1])
        kept = slice(min(MOST_DIRECTIONS, len(correlation)))
        weight = correlation[kept]
        projections = whiten[0] @ u[:, kept] * weight, whiten[1] @ vt.T[:, kept] * weight
        return cls(means, projections)

    def project(self, view: int, rows: Floats) -> Tensor:
        """Rows of the first (0) or second (1) view as float32 [N, D] of length 1."""
        z = (rows - self.means[view]) @ self.projections[view]
        z = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
        return torch.from_numpy(z.astype(np.float32))


def _inverse_root(covariance: Floats, ridge: float) -> Floats:
    """(covariance + ridge I)^(-1/2), symmetric."""
    values, vectors = np.linalg.eigh(covariance)
    least = ridge * max(float(values.mean()), 1e-12)
    root: Floats = (vectors / np.sqrt(np.maximum(values, 0) + least)) @ vectors.T
    return root


class HistogramCCA:
    """The baseline, fitted on a training set."""

    def __init__(self, train_set: CaptionSet, tokenizer: WordTokenizer) -> None:
        self.words = TfIdf(train_set.captions, tokenizer)
        colours, words = _colours(train_set.images), self.words(train_set.captions)
        if train_set.image_of is not None:
            colours = colours[train_set.image_of.numpy()]
        self.cca = CCA.fit(colours, words)

    def embed_set(self, captions: CaptionSet) -> tuple[Tensor, Tensor]:
        """The M images and the N captions of a set: [M, D] and [N, D], rows of length 1."""
        colours, words = _colours(captions.images), self.words(captions.captions)
        return self.cca.project(0, colours), self.cca.project(1, words)


def _colours(images: Tensor) -> Floats:
    # Roots: the distance between shares is then Hellinger's, which large areas do not dominate.
    found: Floats = color_histograms(images).flatten(1).sqrt().double().numpy()
    return found
