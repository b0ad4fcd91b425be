"""The demo's report: one HTML file with everything inside."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from mbm_kernels._core.files import write_atomic
from mbm_kernels.captioning.attention import attention_overlay
from mbm_kernels.captioning.pages import data_uri, render
from mbm_kernels.demo.results import Demo, spread

SHOWN = 12  # images of a split
SHOWN_MAPS = 4  # images of a split with their attention
NAMES = {
    "teacher": "teacher",
    "student": "student, distilled",
    "student_no_distill": "student, alone",
    "most_frequent": "most frequent caption",
    "nearest": "caption of the nearest training picture",
    "two_tower": "two towers",
    "colour_words_cca": "colours and words by CCA",
    "chance": "chance",
}
SPLITS = {
    "val": "val: combinations seen in training",
    "held_out": "held_out: combinations never seen in training",
    "unseen_style": "unseen_style: labels seen, in a style never seen",
}


def write_report(demo: Demo, results: dict[str, Any], path: Path) -> None:
    """Renders and writes the report, atomically.

    Raises:
        OSError: when it cannot be written; a report that was there stays.
    """
    page = render(
        "report.html",
        demo=demo,
        results=results,
        names=NAMES,
        split_names=SPLITS,
        scores={**demo.scores, **demo.baselines},
        found={split: found_images(demo, split) for split in demo.splits},
        galleries={split: gallery(demo, split) for split in demo.splits},
        curves=loss_curves(demo),
    )
    write_atomic(path, page.encode())


def gallery(demo: Demo, split: str) -> list[dict[str, Any]]:
    """The images of a split that are shown."""
    captions = demo.sets[split]
    cards = []
    for place, index in enumerate(spread(len(captions), SHOWN)):
        truth = captions.captions[index]
        predicted = demo.predictions["student"][split][index]
        card = {
            "picture": data_uri(enlarged(captions.images[index])),
            "truth": truth,
            "said": [(NAMES[role], demo.predictions[role][split][index]) for role in demo.scores],
            "maps": [],
        }
        if place < SHOWN_MAPS:
            tokens = demo.tokenizer.encode(predicted)[1:]
            words = [demo.tokenizer.decode([token]).strip() or "end" for token in tokens]
            weights = demo.weights[split][index]
            card["maps"] = [
                (word, data_uri(attention_overlay(captions.images[index], row)))
                for word, row in zip(words, weights, strict=False)
            ]
        cards.append(card)
    return cards


def found_images(demo: Demo, split: str) -> list[dict[str, Any]]:
    """The queries of a split with the images found, and whether each has the query's words."""
    return [
        {
            "text": query.text,
            "images": [
                {
                    "picture": data_uri(enlarged(demo.sets[split].images[index])),
                    "caption": caption,
                    "right": caption == query.text,
                }
                for index, caption in query.found
            ],
        }
        for query in demo.queries[split]
    ]


def enlarged(picture: Tensor, side: int = 128) -> Image.Image:
    """uint8 [3, Y, X] as an image of that side."""
    shown = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    return shown.resize((side, side), Image.Resampling.BICUBIC)


def loss_curves(demo: Demo) -> str:
    """Hard (cross-entropy) loss per step of the captioners' trainings, an SVG data URI."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 3.2), layout="constrained")
    for role in demo.scores:
        history = demo.histories[role]
        rows = history.train
        (line,) = axes.plot(
            [row["step"] for row in rows], [row["hard"] for row in rows], label=NAMES[role]
        )
        if history.validation:
            axes.plot(
                [row["step"] for row in history.validation],
                [row["loss"] for row in history.validation],
                linestyle="none",
                marker="o",
                markersize=4,
                color=line.get_color(),
            )
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy per word")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="svg")
    plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()
