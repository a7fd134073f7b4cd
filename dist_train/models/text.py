"""A small transformer encoder for tokens, written with plain Linear layers so that int8 covers all of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class _Attention(nn.Module):
    """Self-attention of several heads (Vaswani et al. 2017, arXiv:1706.03762).

    Four Linear layers in place of nn.MultiheadAttention, whose packed projections no backend quantizes.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        """x is float [B, S, width]; `padded` bool [B, 1, 1, S] is True for keys that count for nothing."""
        query, key, value = (self._by_head(layer(x)) for layer in (self.query, self.key, self.value))
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
        # The dtype's least number and no -inf: a row of padding alone would be NaN.
        shares = scores.masked_fill(padded, torch.finfo(scores.dtype).min).softmax(-1)
        return self.out((self.dropout(shares) @ value).transpose(1, 2).flatten(2))

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class _Block(nn.Module):
    """Attention and a perceptron, each after a LayerNorm and with a shortcut (Xiong et al. 2020, arXiv:2002.04745)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = _Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), padded))
        return x + self.dropout(self.down(self.act(self.up(self.norm2(x)))))


class _TextTransformer(nn.Module):
    def __init__(
        self, num_classes: int, vocabulary: int, width: int, depth: int, heads: int, max_length: int, dropout: float
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(max_length, width)
        self.blocks = nn.ModuleList(_Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        for table in (self.token, self.position):
            nn.init.normal_(table.weight, std=0.02)  # as BERT does

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        real = attention_mask.unsqueeze(-1).to(self.token.weight.dtype)
        # Padding is zero between the blocks, so that ranges of activations hardly depend on how much of it there is.
        x = (self.token(input_ids) + self.position(places)) * real
        padded = (attention_mask == 0)[:, None, None, :]
        for block in self.blocks:
            x = block(x, padded) * real
        x = (self.norm(x) * real).sum(1) / real.sum(1).clamp(min=1)
        return self.head(x)


def text_transformer(
    num_classes: int,
    vocabulary: int = 257,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    max_length: int = 128,
    dropout: float = 0.0,
) -> nn.Module:
    """A transformer encoder whose mean over the real tokens is classified: outputs float [B, num_classes].

    Inputs are `input_ids`, int64 [B, S], and `attention_mask`, int64 [B, S], 0 where a row is padded; S is at most
    `max_length`. Padding changes the outputs by rounding alone.

    Args:
        vocabulary: number of tokens; 257 for bytes and padding.
        width: numbers of a token; a multiple of `heads`. The perceptrons have four times as many.
        depth: blocks of attention and perceptron.

    Raises:
        ValueError: width is no multiple of heads.
    """
    if width % heads:
        raise ValueError(f"width {width} is no multiple of heads {heads}")
    return _TextTransformer(num_classes, vocabulary, width, depth, heads, max_length, dropout)
