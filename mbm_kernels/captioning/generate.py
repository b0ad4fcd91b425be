"""`mbm-kernels caption generate`: captions for images, in the format asked for."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mbm_kernels._core.files import write_atomic
from mbm_kernels.captioning import formats
from mbm_kernels.captioning.attention import save_attention_sheet
from mbm_kernels.captioning.captioner import MAX_LENGTH, Captioner
from mbm_kernels.captioning.formats import Captioned, Context
from mbm_kernels.captioning.options import Beam, Layers
from mbm_kernels.captioning.progress import training_progress
from mbm_kernels.captioning.sources import Source, listed, read_batches
from mbm_kernels.models import Sampling


@dataclass(frozen=True)
class How:
    """How captions are made; `sheets` is a folder for one PNG per image."""

    max_length: int
    beam: int
    sampling: Sampling | None
    sheets: Path | None

    def __str__(self) -> str:
        if self.sampling is not None:
            given = self.sampling
            cuts = f", the {given.top_k} likeliest" if given.top_k else ""
            cuts += f", top-p {given.top_p:g}" if given.top_p < 1 else ""
            return f"drawn at temperature {given.temperature:g}{cuts}, seed {given.seed}"
        return "greedy" if self.beam == 1 else f"beam of {self.beam}"


def generate(
    path: Annotated[Path, typer.Argument(help="A run or a checkpoint.")],
    pictures: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE|DIR|-...",
            help="Image files, folders of them; - is an image, or paths by line, from stdin.",
        ),
    ],
    layers: Layers = "mbm",
    beam: Beam = 1,
    max_length: Annotated[int, typer.Option(help="The most words of a caption.")] = MAX_LENGTH,
    sample: Annotated[bool, typer.Option("--sample", help="Draw the words.")] = False,
    temperature: Annotated[
        float | None, typer.Option(help="Of --sample; below 1 likely words are likelier.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Of --sample: the fewest words of this probability.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Of --sample: so many of the words.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of --sample: 0 unless given.")] = None,
    format: Annotated[
        str | None,
        typer.Option(help="text, json, jsonl, csv, coco or html; else by the suffix of --output."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="File, written whole or not at all; else stdout.")
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option(help="COCO file with the image ids of --format coco.")
    ] = None,
    attention_maps: Annotated[
        Path | None, typer.Option(help="Folder for one PNG per picture: where each word looked.")
    ] = None,
) -> None:
    """Caption images; what does not decode in a folder or a list is named and left."""
    drawn = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    given: dict[str, Any] = {name: value for name, value in drawn.items() if value is not None}
    if given and not sample:
        option = "--" + next(iter(given)).replace("_", "-")
        raise ValueError(f"{option}: got it without --sample, expected both; add --sample")
    how = How(max_length, beam, Sampling(**given) if sample else None, attention_maps)
    name = formats.named(format, output)
    if annotations is not None and name != "coco":
        raise ValueError(f"--annotations: got it with --format {name}, expected coco; leave it out")
    if output is not None:
        _check_writable(output)
    sources = listed(pictures, sys.stdin.buffer)
    ids = formats.coco_ids(sources, annotations) if name == "coco" else {}
    captioner = Captioner.from_pretrained(path, layers=layers)
    facts = (f"{path.resolve().name}", str(how), f"images of {captioner.image_size} pixels")
    alone = len(sources) == 1 and sources[0].asked
    context = Context(alone=alone, ids=ids, facts=facts)
    found = _captions(captioner, sources, how, context, show=output is not None)
    # The first caption, and with it most errors, before anything is written.
    found = itertools.chain([next(found)], found)
    pieces = formats.FORMATS[name](found, context)
    if output is None:
        for piece in pieces:
            typer.echo(piece, nl=False)
        return
    write_atomic(output, b"".join(pieces))
    count = len(sources) - len(context.left)
    typer.echo(f"{count} caption{'' if count == 1 else 's'} in {output}")


def _captions(
    captioner: Captioner, sources: Sequence[Source], how: How, context: Context, show: bool
) -> Iterator[Captioned]:
    """Raises ValueError where no image decodes."""

    def leave(line: str) -> None:
        context.left.append(line)
        typer.echo(line, err=True)

    done = 0
    title = "captions" if show and sys.stderr.isatty() else None
    with training_progress(title, len(sources), 0, unit="image", stderr=True) as report:
        for batch in read_batches(sources, captioner.image_size, leave):
            captions = captioner.describe(
                torch.stack([pixels for _, pixels in batch]),
                max_length=how.max_length,
                beam=how.beam,
                sampling=how.sampling,
                first=done,
            )
            for (source, pixels), caption in zip(batch, captions, strict=True):
                if how.sheets is not None:
                    sheet = how.sheets / f"{done:03d}-{source.stem}.png"
                    save_attention_sheet(sheet, pixels, caption.words, caption.weights)
                done += 1
                yield Captioned(source, caption)
            report(done, {})
    if not done:
        raise ValueError(
            f"images: got {len(sources)}, of which none decodes, expected one that does; see the "
            "lines above"
        )


def _check_writable(output: Path) -> None:
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    if output.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        got = "a folder" if output.is_dir() else f"a file below {folder}, which takes none"
        raise ValueError(f"output {output}: got {got}, expected a file that can be written")
