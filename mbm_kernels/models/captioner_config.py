"""The captioner's configuration, and the two that have a name."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mbm_kernels._core import checks
from mbm_kernels.models.config import Config
from mbm_kernels.models.image_encoder import POSITION_FEATURES

ATTENTIONS = ("additive", "dot")
MOST_PARAMETERS = 1 << 30  # 4 GiB in float32, and four times that in training by AdamW


@dataclass(frozen=True)
class CaptionerConfig(Config):
    """Sizes of a captioner.

    image_size: side in pixels, a multiple of 8. channels: of the three convolutions, each of which
    halves the side. depth: residual convolutions after them. features: of the map of positions, D.
    embedding: of a word. hidden: of the GRU. attention: "additive" or "dot". attention_size: in
    which additive attention compares. heads: of dot attention, a divisor of features.

    Raises:
        ValueError, TypeError: a value of the wrong kind or outside its bounds, or more than 2^30
            parameters in all, of which the words' are counted where the model is built.
    """

    image_size: int = 64
    channels: tuple[int, int, int] = (16, 48, 96)
    depth: int = 1
    features: int = 128
    embedding: int = 64
    hidden: int = 192
    attention: str = "additive"
    attention_size: int = 128
    heads: int = 4

    def __post_init__(self) -> None:
        self.image_side("image_size")
        self.widths("channels", 3)
        self.whole("depth", most=64)
        self.whole("features", "embedding", "hidden", "attention_size", "heads")
        checks.choice(type(self).__name__, "attention", self.attention, ATTENTIONS)
        if self.attention == "dot" and self.features % self.heads:
            expected = f"a divisor of features = {self.features}"
            self.fail("heads", self.heads, expected, "change one of them")
        self.check_count(0)

    def check_count(self, vocab_size: int) -> None:
        count = self.parameters(vocab_size)
        if count > MOST_PARAMETERS:
            got = f"{count:,} parameters with {vocab_size:,} words"
            expected = f"up to {MOST_PARAMETERS:,}"
            checks.fail(type(self).__name__, "sizes", got, expected, "take smaller ones")

    def parameters(self, vocab_size: int) -> int:
        """How many a captioner of so many words has."""
        d, e, h, a = self.features, self.embedding, self.hidden, self.attention_size
        first, second, last = self.channels
        convolutions = 9 * (3 * first + first * second + second * last + self.depth * last**2)
        # A bias each, and a scale and a shift for each LayerNorm.
        convolutions += 3 * sum(self.channels) + last * (3 * self.depth - 2)
        image = convolutions + (last + POSITION_FEATURES + 3) * d
        joins = (d + 1) * h + (d + e + 1) * h + (h + d + 1) * h
        gru = 6 * h * (h + 1)
        additive = (h + d + 3) * a
        dot = (h + 1) * d + 2 * (d + 1) * d
        attention = additive if self.attention == "additive" else dot
        return image + joins + gru + attention + vocab_size * (e + h + 1)


SIZES = {
    "student": CaptionerConfig(),
    "teacher": CaptionerConfig(
        channels=(32, 96, 160), features=192, embedding=96, hidden=320, attention_size=192, heads=8
    ),
}


def configured(
    config: CaptionerConfig | None,
    size: str | None,
    attention: str | None,
    image_size: int | None,
) -> CaptionerConfig:
    """A configuration, or the named one, with what else is given in place of its own.

    Raises:
        ValueError: an unknown name, one beside config, or an impossible value.
        TypeError: config is none.
    """
    if config is None:
        size = "student" if size is None else size
        if size not in SIZES:
            raise ValueError(f"size: got {size!r}, expected one of {sorted(SIZES)}")
        config = SIZES[size]
    elif size is not None:
        raise ValueError(f"size: got {size!r} beside config, expected one of them; leave one out")
    if not isinstance(config, CaptionerConfig):
        got, remedy = checks.describe(config), "CaptionerConfig.from_dict takes a dictionary"
        checks.fail("Captioner", "config", got, "a CaptionerConfig", remedy, TypeError)
    changes = {"attention": attention, "image_size": image_size}
    return replace(config, **{name: x for name, x in changes.items() if x is not None})  # type: ignore[arg-type]
