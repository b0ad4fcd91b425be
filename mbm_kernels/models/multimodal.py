"""The multimodal big model: image, words, colour and time joined by one linear layer.

B batch, T length of a sequence, C features of a time step, Q bins of a colour channel, J joint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mbm_kernels._core import checks
from mbm_kernels.models.config import Config
from mbm_kernels.models.image_encoder import ImageEncoder, check_images
from mbm_kernels.models.layers import Layers, layers_named
from mbm_kernels.models.sequence_encoder import (
    SequenceEncoder,
    TextEncoder,
    check_sequence,
    check_tokens,
)

STREAMS = ("image", "words", "color", "time")
HEADS = ("similarity", "control")
NAME = "MultimodalBigModel"


@dataclass(frozen=True)
class MultimodalConfig(Config):
    """Streams, heads and sizes of a multimodal big model.

    streams: of "image", "words", "color", "time". heads: of "similarity", "control". joint: J.
    controls: outputs of the control head. vocab_size, pad_id: of the words. image_size: side in
    pixels, a multiple of 8. channels, features: of the image's encoder. embedding, hidden: of the
    words'. color_bins: Q. color_channels: of the two convolutions over colours. time_features: C.
    time_hidden: of the time stream's GRU.

    Raises:
        ValueError, TypeError: a value of the wrong kind or outside its bounds.
    """

    streams: tuple[str, ...] = STREAMS
    heads: tuple[str, ...] = ("similarity",)
    joint: int = 256
    controls: int = 1
    vocab_size: int = 0
    pad_id: int = 0
    image_size: int = 64
    channels: tuple[int, int, int] = (16, 48, 96)
    features: int = 128
    embedding: int = 64
    hidden: int = 192
    color_bins: int = 8
    color_channels: tuple[int, int] = (32, 64)
    time_features: int = 1
    time_hidden: int = 64

    def __post_init__(self) -> None:
        self.choices("streams", STREAMS)
        self.choices("heads", HEADS)
        self.whole("joint", "controls", "features", "embedding", "hidden")
        self.whole("time_features", "time_hidden")
        self.whole("pad_id", "vocab_size", least=0, most=2**62)
        if "words" in self.streams and self.vocab_size <= self.pad_id:
            expected = f"more than pad_id = {self.pad_id} for the words"
            self.fail("vocab_size", self.vocab_size, expected, "give the tokenizer's")
        self.image_side("image_size")
        self.widths("channels", 3)
        self.widths("color_channels", 2)
        self.whole("color_bins", least=4, most=64)  # two poolings leave 1 to 16


class ColorEncoder(nn.Module):
    """A joint histogram of colours [B, Q, Q, Q] (red, green, blue) -> [B, K].

    Two pooled convolutions over green and blue, red being the channels.
    """

    def __init__(self, bins: int, channels: tuple[int, int], layers: Layers) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            layers.conv_bias_act(c, k, 3, padding=1, activation="relu", max_pool=2)
            for c, k in pairwise((bins, *channels))
        )
        self.out_features = channels[-1] * (bins // 4) ** 2
        self.norm = nn.LayerNorm(self.out_features)

    def forward(self, color: Tensor) -> Tensor:
        x = color.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            x = block(x)
        return self.norm(x.flatten(1))


class MultimodalBigModel(nn.Module):
    """Y = Linear(Concat(CNN(image), RNN(words), CNN(color), RNN(time))), and heads on Y.

    A stream that a call leaves out is left out of the sum that a linear layer over a concatenation
    is: Y is the bias plus each given stream's share, as if the others' encodings were 0. A model
    that is to be used so should be trained so.

    Y is linear in the encodings, so that it adds what the streams say and relates none to another.
    The heads do: they see Y^2, whose mixed terms are products of the streams' shares.

    Args:
        config: streams, heads and sizes.
        layers: "mbm" for this package's modules, "stock" for PyTorch's; the state_dict is the same.

    Raises:
        ValueError: for an unknown name. TypeError: config is none.
    """

    def __init__(self, config: MultimodalConfig, *, layers: str = "mbm") -> None:
        super().__init__()
        if not isinstance(config, MultimodalConfig):
            got, remedy = checks.describe(config), "MultimodalConfig.from_dict takes a dictionary"
            checks.fail(NAME, "config", got, "a MultimodalConfig", remedy, TypeError)
        table = layers_named(layers)
        self.config, self.layers = config, layers
        self.encoders = nn.ModuleDict()
        self.parts: dict[str, int] = {}  # width of each stream's encoding, in the order of STREAMS
        for stream in (x for x in STREAMS if x in config.streams):
            self.encoders[stream], self.parts[stream] = _encoder(stream, config, table)
        self.join: Any = table.concat_linear(tuple(self.parts.values()), config.joint)
        outputs = {"similarity": 1, "control": config.controls}
        self.heads = nn.ModuleDict(
            {x: table.linear(2 * config.joint, outputs[x]) for x in HEADS if x in config.heads}
        )
        self.join_some = table.join

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint keeps to build the model again."""
        return {"config": self.config.as_dict()}

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def image_size(self) -> int:
        return self.config.image_size

    def forward(
        self,
        image: Tensor | None = None,
        words: Tensor | None = None,
        color: Tensor | None = None,
        time: Tensor | None = None,
        *,
        word_lengths: Tensor | None = None,
        time_lengths: Tensor | None = None,
    ) -> Tensor:
        """The joint representation Y of any of the streams that the config names, at least one.

        Args:
            image: float [B, 3, Y, X], values in [-1, 1].
            words: int64 [B, T].
            color: float [B, Q, Q, Q], by red, green and blue.
            time: float [B, T, C].
            word_lengths, time_lengths: int64 [B], 0 <= length <= T, None for T each; what follows
                has no effect.

        Returns:
            [B, J]; `similarity` and `control` read it.

        Raises:
            ValueError: no stream, one that the config does not name, lengths without their stream,
                or a wrong shape. TypeError: on a wrong dtype.
        """
        given = {"image": image, "words": words, "color": color, "time": time}
        return self.joint(self.encode(given, {"words": word_lengths, "time": time_lengths}))

    def encode(
        self, given: Mapping[str, Tensor | None], lengths: Mapping[str, Tensor | None]
    ) -> dict[str, Tensor]:
        """The encoding [B, part] of each stream that is given, as `forward` takes them."""
        found = self._check(given, lengths)
        return {stream: self._encode(stream, x, lengths.get(stream)) for stream, x in found.items()}

    def joint(self, encodings: Mapping[str, Tensor]) -> Tensor:
        """Y [B, J] of what `encode` gives, or some of it; rows may be repeated or exchanged."""
        found = [stream for stream in self.parts if stream in encodings]
        inputs = [encodings[stream] for stream in found]
        if len(found) == len(self.parts):
            return self.join(*inputs)
        shares = self.join.weight.split(list(self.parts.values()), dim=1)
        by_stream = dict(zip(self.parts, shares, strict=True))
        weight = torch.cat([by_stream[stream] for stream in found], dim=1)
        return self.join_some(inputs, weight, self.join.bias)

    def similarity(self, joint: Tensor) -> Tensor:
        """Y [B, J] -> logits [B]: above 0 where the streams belong together."""
        return self._head("similarity", joint).squeeze(-1)

    def control(self, joint: Tensor) -> Tensor:
        """Y [B, J] -> [B, controls]."""
        return self._head("control", joint)

    def _head(self, name: str, joint: Tensor) -> Tensor:
        if name not in self.heads:
            got, expected = f"a call of {name}", f"one of {list(self.heads)}"
            checks.fail(NAME, "heads", got, expected, "name it in the config")
        return self.heads[name](torch.cat([joint, joint.square()], dim=-1))

    def _encode(self, stream: str, x: Tensor, lengths: Tensor | None) -> Tensor:
        encoder = self.encoders[stream]
        if stream == "image":
            return encoder(x).mean(dim=1)
        return encoder(x) if stream == "color" else encoder(x, lengths)

    def _check(
        self, given: Mapping[str, Tensor | None], lengths: Mapping[str, Tensor | None]
    ) -> dict[str, Tensor]:
        """The streams that are there."""
        found = {stream: x for stream, x in given.items() if x is not None}
        known = list(self.parts)
        if not found:
            checks.fail(NAME, "streams", "none", f"one or more of {known}", "give one")
        for stream in found:
            if stream not in self.parts:
                expected = f"some of {known}, which the config names"
                checks.fail(NAME, "streams", stream, expected, "leave it out")
        batch = None
        for stream, x in found.items():
            self._check_stream(stream, x)
            if batch is not None and x.shape[0] != batch:
                got, expected = f"a batch of {x.shape[0]}", f"{batch} as in {next(iter(found))}"
                checks.fail(NAME, stream, got, expected, "give each stream for the same rows")
            batch = x.shape[0]
        for stream, length in lengths.items():
            if length is None:
                continue
            name = "word_lengths" if stream == "words" else "time_lengths"
            if stream not in found:
                checks.fail(NAME, name, f"lengths without {stream}", "both", "give both or none")
            x = found[stream]
            checks.lengths(NAME, name, length, x.shape[0], x.shape[1], "T", x)
        return found

    def _check_stream(self, stream: str, x: Tensor) -> None:
        config = self.config
        if stream == "image":
            check_images(x, config.image_size)
        elif stream == "words":
            check_tokens(NAME, "words", x)
        elif stream == "time":
            check_sequence(NAME, "time", x, config.time_features)
        else:
            q = config.color_bins
            checks.tensor(NAME, "color", x, 4)
            checks.shape(NAME, "color", x, "B, Q, Q, Q", (x.shape[0], q, q, q))
            if not x.is_floating_point():
                remedy = "divide counts by the number of pixels"
                checks.fail(NAME, "color", x.dtype, "floats", remedy, TypeError)


def _encoder(stream: str, config: MultimodalConfig, table: Layers) -> tuple[nn.Module, int]:
    """A stream's encoder and the width of what it gives."""
    if stream == "image":
        encoder = ImageEncoder(config.channels, config.features, config.image_size, table)
        return encoder, config.features
    if stream == "words":
        sizes = (config.vocab_size, config.embedding, config.hidden, config.pad_id)
        return TextEncoder(*sizes, table), config.hidden
    if stream == "color":
        color = ColorEncoder(config.color_bins, config.color_channels, table)
        return color, color.out_features
    return SequenceEncoder(config.time_features, config.time_hidden, table), config.time_hidden
