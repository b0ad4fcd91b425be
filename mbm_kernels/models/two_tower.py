"""Two towers: images and texts embedded in one space, for retrieval by similarity.

B batch, T length of a text, D dimension of the embeddings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbm_kernels._core import checks
from mbm_kernels.models.config import Config
from mbm_kernels.models.image_encoder import ImageEncoder, check_images
from mbm_kernels.models.layers import layers_named
from mbm_kernels.models.sequence_encoder import TextEncoder, check_tokens

KINDS = ("infonce", "siglip")
MOST_SCALE = 100.0  # of the similarities: a softmax sharper than this no longer learns
SIGLIP_BIAS = -10.0  # of the logits at the start: nearly all pairs are no pairs


@dataclass(frozen=True)
class TwoTowerConfig(Config):
    """Sizes of the two towers.

    image_size: side in pixels, a multiple of 8. channels: of the three convolutions, each of which
    halves the side. features: of the map of positions. embedding: of a word. hidden: of the GRU.
    dimension: D. kind: of `contrastive_loss`, "infonce" or "siglip". temperature: at the start,
    1 / the factor of the similarities. pad_id: the token that fills texts up.

    Raises:
        ValueError, TypeError: a value of the wrong kind or outside its bounds.
    """

    image_size: int = 64
    channels: tuple[int, int, int] = (16, 48, 96)
    features: int = 128
    embedding: int = 64
    hidden: int = 192
    dimension: int = 128
    kind: str = "infonce"
    temperature: float = 0.07
    pad_id: int = 0

    def __post_init__(self) -> None:
        self.image_side("image_size")
        self.widths("channels", 3)
        self.whole("features", "embedding", "hidden", "dimension")
        self.whole("pad_id", least=0, most=2**62)
        checks.choice("TwoTowerConfig", "kind", self.kind, KINDS)
        checks.number("TwoTowerConfig", "temperature", self.temperature)
        if not 1 / MOST_SCALE <= self.temperature < math.inf:
            expected = f"{1 / MOST_SCALE} or more, and finite"
            self.fail("temperature", self.temperature, expected, "0.07 is usual")


class TwoTower(nn.Module):
    """Image and text encoders whose normalised outputs are near for what belongs together.

    Image: the captioner's convolutions, the mean over positions and a projection. Text: an
    embedding, a GRU's state after the last word and a projection.

    Args:
        vocab_size: number of token ids.
        config: sizes; None takes the defaults.
        layers: "mbm" for this package's modules, "stock" for PyTorch's; the state_dict is the same.

    Raises:
        ValueError: for an unknown name or an unusable number. TypeError: config is none.
    """

    bias: nn.Parameter | None

    def __init__(
        self, vocab_size: int, *, config: TwoTowerConfig | None = None, layers: str = "mbm"
    ) -> None:
        super().__init__()
        config = TwoTowerConfig() if config is None else config
        if not isinstance(config, TwoTowerConfig):
            got, remedy = checks.describe(config), "TwoTowerConfig.from_dict takes a dictionary"
            checks.fail("TwoTower", "config", got, "a TwoTowerConfig", remedy, TypeError)
        checks.index("TwoTower", "vocab_size", vocab_size)
        if vocab_size <= config.pad_id:
            expected = f"more than pad_id = {config.pad_id}"
            checks.fail("TwoTower", "vocab_size", vocab_size, expected, "count the padding too")
        table = layers_named(layers)
        self.config, self.layers, self.vocab_size = config, layers, vocab_size
        self.image_encoder = ImageEncoder(
            config.channels, config.features, config.image_size, table
        )
        self.image_proj = table.linear(config.features, config.dimension)
        self.text_encoder = TextEncoder(
            vocab_size, config.embedding, config.hidden, config.pad_id, table
        )
        self.text_proj = table.linear(config.hidden, config.dimension)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))
        bias = nn.Parameter(torch.tensor(SIGLIP_BIAS)) if config.kind == "siglip" else None
        self.register_parameter("bias", bias)
        self.contrastive_loss = table.contrastive_loss

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint keeps to build the model again."""
        return {"vocab_size": self.vocab_size, "config": self.config.as_dict()}

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def scale(self) -> Tensor:
        """The learned factor of the similarities, a scalar up to 100."""
        return self.log_scale.clamp(max=math.log(MOST_SCALE)).exp()

    def embed_images(self, images: Tensor) -> Tensor:
        """images, floats [B, 3, Y, X] in [-1, 1] -> [B, D] of length 1."""
        check_images(images, self.image_size)
        features = self.image_encoder(images).mean(dim=1)
        return F.normalize(self.image_proj(features), dim=-1)

    def embed_texts(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """tokens int64 [B, T], lengths int64 [B], None for T each -> [B, D] of length 1."""
        check_tokens("TwoTower", "tokens", tokens)
        if lengths is not None:
            batch, steps = tokens.shape
            checks.lengths("TwoTower", "lengths", lengths, batch, steps, "T", tokens)
        return F.normalize(self.text_proj(self.text_encoder(tokens, lengths)), dim=-1)

    def forward(
        self, images: Tensor, tokens: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings of B images and of the B texts that belong to them.

        Args:
            images: float [B, 3, Y, X], values in [-1, 1].
            tokens: int64 [B, T].
            lengths: int64 [B], 0 <= length <= T, None for T each; what follows a text's end has no
                effect.

        Returns:
            image embeddings [B, D] and text embeddings [B, D], each row of length 1.

        Raises:
            ValueError: on a wrong shape or length. TypeError: on a wrong dtype.
        """
        if tokens.dim() == 2:
            checks.shape("TwoTower", "tokens", tokens, "B, T", (images.shape[0], tokens.shape[1]))
        return self.embed_images(images), self.embed_texts(tokens, lengths)

    def loss(self, image_embedding: Tensor, text_embedding: Tensor) -> Tensor:
        """`contrastive_loss` of what `forward` returned, a scalar; row b belongs to row b."""
        kind = self.config.kind
        bias = {} if self.bias is None else {"bias": self.bias}
        return self.contrastive_loss(image_embedding, text_embedding, self.scale, kind=kind, **bias)
