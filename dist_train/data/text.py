"""Text as tokens: bytes as ids, and batches of texts padded to the longest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

PADDING = 0
"""Token that fills a row up; bytes are 1 to 256."""
BYTE_TOKENS = 257
"""Number of tokens of bytes, with padding."""
IGNORED = -100
"""Target of a token that counts neither in the loss nor in the metrics, as in torch's cross_entropy."""
DYNAMIC = {name: {1: "sequence"} for name in ("input_ids", "attention_mask")}
"""Dimensions of a text's inputs that vary, as `Splits.dynamic` takes them."""


def byte_tokens(text: str, max_length: int) -> list[int]:
    """Returns the first `max_length` bytes of a text in UTF-8 as tokens: each byte plus 1."""
    return [byte + 1 for byte in text.encode()[:max_length]]


@dataclass(frozen=True)
class PadToLongest:
    """Stacks items of different lengths: pads the first dimension of each part to the longest item.

    Attributes:
        values: the number to pad with, by the name of an input; 0 for others.
        target: the number to pad targets with that have a dimension, as classes of tokens.
    """

    values: Mapping[str, int] = field(default_factory=dict)
    target: int = IGNORED

    def __call__(self, items: Sequence[tuple[dict[str, Tensor], Any]]) -> tuple[dict[str, Tensor], Tensor]:
        """Returns inputs [B, longest, ...] by name, and targets [B], or [B, longest] where they have a dimension."""
        names = items[0][0]
        inputs = {name: padded([item[0][name] for item in items], self.values.get(name, 0)) for name in names}
        return inputs, padded([torch.as_tensor(item[1]) for item in items], self.target)


def padded(parts: Sequence[Tensor], value: int) -> Tensor:
    """Stacks tensors [S, ...] of different S to [B, longest, ...]; numbers to [B]."""
    if parts[0].dim() == 0:
        return torch.stack(list(parts))
    out = parts[0].new_full((len(parts), max(map(len, parts)), *parts[0].shape[1:]), value)
    for row, part in zip(out, parts, strict=True):
        row[: len(part)] = part
    return out


class ByteLines(Dataset[Any]):
    """Texts as bytes, each with the index of its class; an item is (`input_ids` and `attention_mask` [S], class).

    Args:
        texts: at least one byte each, in UTF-8.
        targets: an index of a class for each.
        max_length: most bytes of an item; the rest is cut off.
    """

    def __init__(self, texts: Sequence[str], targets: Sequence[int], max_length: int) -> None:
        parts = [text.encode()[:max_length] for text in texts]
        self._bytes = np.frombuffer(b"".join(parts), np.uint8)
        self._ends = np.cumsum([len(part) for part in parts])
        self._targets = np.asarray(targets, np.int64)
        digest = hashlib.sha256()
        for array in (self._bytes, self._ends, self._targets):
            digest.update(array.tobytes())
        self.fingerprint = digest.hexdigest()[:32]

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], int]:
        begin = self._ends[index - 1] if index else 0
        tokens = torch.from_numpy(self._bytes[begin : self._ends[index]].astype(np.int64) + 1)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, int(self._targets[index])

    def longest(self) -> dict[str, Tensor]:
        """Inputs of an item as long as the longest, of the largest tokens; a model is tried on it at set-up."""
        length = int(np.diff(self._ends, prepend=0).max())
        return {name: torch.full((length,), value) for name, value in (("input_ids", 256), ("attention_mask", 1))}

    def text(self, index: int) -> str:
        """Text of an item; a letter that the cut divides is left out."""
        begin = self._ends[index - 1] if index else 0
        return self._bytes[begin : self._ends[index]].tobytes().decode(errors="ignore")
