"""A convolutional encoder, a GRU decoder and attention between them, for short image captions.

B batch, T target length, S positions of the feature map, D feature, E embedding, H hidden.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from mbm_kernels.models.captioner_config import CaptionerConfig, configured
from mbm_kernels.models.generation import search
from mbm_kernels.models.image_encoder import ImageEncoder, check_images
from mbm_kernels.models.layers import Layers, layers_named
from mbm_kernels.models.sampling import Sampling
from mbm_kernels.models.search_state import EncodedImages
from mbm_kernels.ops.additive_attention import AdditiveAttentionKeys


class CaptionerOutput(NamedTuple):
    """hidden [B, T, H], features [B, S, D] and attention weights [B, T, S]."""

    hidden: Tensor
    features: Tensor
    weights: Tensor


class DotAttention(nn.Module):
    """Multi-head scaled dot attention of states over features, weights averaged over heads."""

    def __init__(self, query_dim: int, key_dim: int, heads: int, layers: Layers) -> None:
        super().__init__()
        self.heads = heads
        self.query_proj = layers.linear(query_dim, key_dim)
        self.key_proj = layers.linear(key_dim, key_dim)
        self.value_proj = layers.linear(key_dim, key_dim)
        self.attend_dot = layers.attend_dot

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, N, *, D / N]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        context, weights = self.attend_dot(
            self.split(self.query_proj(query)), key, value, need_weights="mean"
        )
        return context.transpose(1, 2).flatten(2), weights

    def forward(self, query: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.split(self.key_proj(features)), self.split(self.value_proj(features))
        return self.attend(query, key, value)


class Captioner(nn.Module):
    """Image captioner whose attention follows the recurrence.

    The GRU runs a whole sequence as one call; its states then query the feature map, so every
    operation of a training step is called once.

    Args:
        vocab_size: number of token ids.
        config: sizes and the kind of attention.
        size: "student", the default, or "teacher": a configuration by name (``SIZES``).
        attention, image_size: in place of the configuration's.
        layers: "mbm" for this package's modules, "stock" for PyTorch's; the state_dict is the same.
        pad_id, bos_id, eos_id: token ids.

    Raises:
        ValueError: for an unknown name or an unusable number, before anything is allocated.
        TypeError: config is none.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        config: CaptionerConfig | None = None,
        size: str | None = None,
        attention: str | None = None,
        layers: str = "mbm",
        image_size: int | None = None,
        pad_id: int = 0,
        bos_id: int = 1,
        eos_id: int = 2,
    ) -> None:
        super().__init__()
        config = configured(config, size, attention, image_size)
        if not max(pad_id, bos_id, eos_id) < vocab_size:
            raise ValueError(
                f"vocab_size: got {vocab_size}, expected more than the ids "
                f"pad {pad_id}, bos {bos_id}, eos {eos_id}"
            )
        config.check_count(vocab_size)
        table = layers_named(layers)
        self.config, self.layers, self.table = config, layers, table
        self.image_size, self.vocab_size = config.image_size, vocab_size
        self.pad_id, self.bos_id, self.eos_id = pad_id, bos_id, eos_id

        d, e, h = config.features, config.embedding, config.hidden
        self.encoder = ImageEncoder(config.channels, d, config.image_size, table, config.depth)
        self.embedding = nn.Embedding(vocab_size, e, padding_idx=pad_id)
        self.first_state = nn.Linear(d, h)
        self.join_input: Any = table.concat_linear((d, e), h)
        self.gru = table.gru(h, h, batch_first=True)
        if config.attention == "additive":
            self.attention: Any = table.additive_attention(h, d, config.attention_size)
        else:
            self.attention = DotAttention(h, d, config.heads, table)
        self.join_output = table.concat_linear((h, d), h)
        self.head = nn.Linear(h, vocab_size)

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint keeps to build the model again."""
        ids = {"pad_id": self.pad_id, "bos_id": self.bos_id, "eos_id": self.eos_id}
        return {"vocab_size": self.vocab_size, "config": self.config.as_dict(), **ids}

    @property
    def hidden_size(self) -> int:
        return self.gru.hidden_size

    @property
    def feature_size(self) -> int:
        return self.encoder.norm.normalized_shape[0]

    def forward(self, images: Tensor, tokens: Tensor) -> CaptionerOutput:
        """Hidden states for teacher forcing.

        Args:
            images: float [B, 3, Y, X], values in [-1, 1].
            tokens: int64 [B, T], the words before each prediction, beginning with ``bos_id``.

        Returns:
            hidden [B, T, H], features [B, S, D], weights [B, T, S].

        Raises:
            ValueError: on a wrong shape. TypeError: on a wrong dtype.
        """
        check_images(images, self.image_size)
        if tokens.dtype != torch.int64:
            raise TypeError(f"tokens: got {tokens.dtype}, expected torch.int64")
        if tokens.dim() != 2 or tokens.shape[0] != images.shape[0]:
            raise ValueError(
                f"tokens: got shape {tuple(tokens.shape)}, expected [B, T] with B = "
                f"{images.shape[0]} as for images"
            )
        features = self.encoder(images)
        summary = features.mean(dim=1)
        first = torch.tanh(self.first_state(summary))
        x = torch.relu(self.join_input(summary.unsqueeze(1), self.embedding(tokens)))
        states, _ = self.gru(x, first.unsqueeze(0))
        context, weights = self.attention(states, features)
        hidden = torch.tanh(self.join_output(states, context))
        return CaptionerOutput(hidden, features, weights)

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary scores [..., V] of hidden states [..., H]."""
        return self.head(hidden)

    def encode(self, images: Tensor) -> EncodedImages:
        """Everything of the images that decoding reuses at each step."""
        check_images(images, self.image_size)
        features = self.encoder(images)
        summary = features.mean(dim=1)
        key, value = self.attention.key_proj(features), features
        if isinstance(self.attention, DotAttention):
            key = self.attention.split(key)
            value = self.attention.split(self.attention.value_proj(features))
        state = torch.tanh(self.first_state(summary))
        return EncodedImages(features, summary, key, value, state)

    def step(
        self, encoded: EncodedImages, tokens: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One word for K hypotheses of each image, which share its keys as K queries.

        Args:
            tokens: int64 [B, K], the last words. state: [B, K, H].

        Returns:
            logits [B, K, V], the new state [B, K, H], weights [B, K, S].
        """
        x = self.join_input(encoded.summary.unsqueeze(1), self.embedding(tokens))
        hidden, state, weights = self.advance(torch.relu(x), state, encoded.key, encoded.value)
        return self.head(hidden), state, weights

    def advance(
        self, x: Tensor, state: Tensor, key: Tensor | AdditiveAttentionKeys, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The recurrence, attention over what `encode` gives, and their join, for one word.

        Args:
            x: [B, K, H], the joined input. state: [B, K, H].
            key: additive attention's may be AdditiveAttentionKeys, in "mbm" layers.

        Returns:
            hidden [B, K, H], the new state [B, K, H], weights [B, K, S].
        """
        gru, attention = self.gru, self.attention
        cell = self.table.gru_cell(
            x.flatten(0, 1),
            state.flatten(0, 1),
            gru.weight_ih_l0,
            gru.weight_hh_l0,
            gru.bias_ih_l0,
            gru.bias_hh_l0,
        )
        state = cell.unflatten(0, x.shape[:2])
        if isinstance(attention, DotAttention):
            assert isinstance(key, Tensor)
            context, weights = attention.attend(state, key, value)
        else:
            query = attention.query_proj(state)
            context, weights = self.table.attend_additive(query, key, value, attention.v)
        return torch.tanh(self.join_output(state, context)), state, weights

    @overload
    def generate(
        self,
        images: Tensor,
        max_length: int = ...,
        beam: int = ...,
        return_weights: Literal[False] = ...,
        sampling: Sampling | None = ...,
    ) -> list[list[int]]: ...

    @overload
    def generate(
        self,
        images: Tensor,
        max_length: int,
        beam: int,
        return_weights: Literal[True],
        sampling: Sampling | None = ...,
    ) -> tuple[list[list[int]], list[Tensor]]: ...

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,
        max_length: int = 24,
        beam: int = 1,
        return_weights: bool = False,
        sampling: Sampling | None = None,
    ) -> list[list[int]] | tuple[list[list[int]], list[Tensor]]:
        """Captions as token ids, without ``bos_id`` and ``eos_id``.

        Args:
            images: float [B, 3, Y, X], values in [-1, 1].
            max_length: the most tokens of a caption.
            beam: hypotheses kept per image; 1 is greedy. The score is the log-probability
                divided by the length. A tie goes to the earlier hypothesis and the lower id; of
                a beam where torch.topk chooses (layers "stock", or no kernel runs), to any.
            return_weights: also return the attention of each word, one [length, S] per image.
            sampling: draw the words instead, one caption an image; ``beam`` stays 1.

        Raises:
            ValueError: if ``max_length`` or ``beam`` is below 1, or above with ``sampling``, or
                images have a wrong shape.
        """
        for name, number in (("max_length", max_length), ("beam", beam)):
            if number < 1:
                raise ValueError(f"{name}: got {number}, expected at least 1")
        if sampling is not None and beam > 1:
            raise ValueError(f"beam: got {beam} with sampling, expected 1; leave one of them out")
        was_training = self.training
        self.eval()
        try:
            encoded = self.encode(images)
            tokens, weights = search(
                self, encoded, max_length, beam, return_weights, sampling=sampling
            )
        finally:
            self.train(was_training)
        return (tokens, weights) if return_weights else tokens
