"""Small networks around torch's attention, for images [B, 3, 8, 8]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class OnPatches(nn.Module):
    """A body on the 16 patches of an image, [B, 16, 32], between an embedding and a head of 5 classes."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Conv2d(3, 32, 2, 2), body, nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(x).flatten(2).transpose(1, 2)).mean(1))


class Attended(nn.Module):
    """Self-attention, or attention to the first 8 positions, with a causal mask where `masked`."""

    def __init__(self, sequence_first: bool = False, weights: bool = False, cross: bool = False, masked: bool = False):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=not sequence_first)
        self.sequence_first, self.weights, self.cross = sequence_first, weights, cross
        self.register_buffer("mask", torch.triu(torch.ones(16, 16, dtype=torch.bool), 1) if masked else None)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.sequence_first else x
        other = x[:, :8] if self.cross else x
        found, weights = self.attention(x, other, other, need_weights=self.weights, attn_mask=self.mask)
        if weights is not None:
            shares = weights.amax(-1, keepdim=True)  # [B, L, 1]
            found = found * (1 + (shares.transpose(0, 1) if self.sequence_first else shares))
        return found.transpose(0, 1) if self.sequence_first else found


class Decoded(nn.Module):
    """Learned queries that a decoder lets attend to the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 4, 32))
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, batch_first=True), 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.queries + x.mean(1, keepdim=True), x)


def encoder(norm_first: bool = False, activation: str = "relu") -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, activation=activation, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(32), enable_nested_tensor=not norm_first)


NETS: dict[str, Callable[[], nn.Module]] = {
    "self": Attended,
    "sequence-first-with-weights": lambda: Attended(sequence_first=True, weights=True),
    "cross": lambda: Attended(cross=True),
    "masked": lambda: Attended(masked=True),
    "encoder": encoder,
    "encoder-norm-first": lambda: encoder(norm_first=True, activation="gelu"),
    "decoder": Decoded,
}


def net(name: str) -> nn.Module:
    torch.manual_seed(0)
    return OnPatches(NETS[name]()).eval()
