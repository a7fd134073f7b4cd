"""Rows of Hugging Face's datasets as items: texts as tokens, images as pixels, values as classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional

from dist_train.data.datasets.huggingface_columns import Classes, Column
from dist_train.data.image_file import centre
from dist_train.data.text import BYTE_TOKENS, IGNORED, PADDING, byte_tokens

Tokens = tuple[dict[str, list[int]], list[int | None]]
"""A tokenizer's answer by name, and the word of each token, None for tokens of none."""


class Tokenize(Protocol):
    @property
    def max_length(self) -> int:
        """Most tokens of an item."""

    @property
    def largest(self) -> int:
        """The largest token."""

    def __call__(self, texts: Sequence[Any]) -> Tokens:
        """Makes tokens of a text or a pair of texts; a text may be a list of words."""


@dataclass(frozen=True)
class Bytes:
    """Bytes as tokens; of a pair both, with a space between them. An empty text is one token of padding."""

    max_length: int
    largest: int = BYTE_TOKENS - 1

    def __call__(self, texts: Sequence[Any]) -> Tokens:
        words = [word for text in texts for word in ([text] if isinstance(text, str) else text)]
        ids, places = list[int](), list[int | None]()
        for place, word in enumerate(words):
            if place:
                ids += byte_tokens(" ", 1)
                places.append(None)
            tokens = byte_tokens(word, self.max_length)
            ids += tokens
            places += [place] * len(tokens)
        ids, places = ids[: self.max_length], places[: self.max_length]
        if not ids:
            return {"input_ids": [PADDING], "attention_mask": [0]}, [None]
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}, places


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of transformers; texts are cut off at `max_length` tokens."""

    tokenizer: Any
    max_length: int

    @property
    def largest(self) -> int:
        return len(self.tokenizer) - 1

    def __call__(self, texts: Sequence[Any]) -> Tokens:
        split = not isinstance(texts[0], str)
        found = self.tokenizer(*texts, truncation=True, max_length=self.max_length, is_split_into_words=split)
        return dict(found), found.word_ids() if split else []


class Texts(Dataset[Any]):
    """Rows of texts; an item is (what the tokenizer returns, int64 [S] each, class or classes of the tokens).

    Of a text of words with a class each, the first token of a word has the word's class, and others have IGNORED.
    """

    def __init__(self, rows: Any, texts: Sequence[str], label: str, tokenize: Tokenize, classes: Classes) -> None:
        self._rows = rows.select_columns([*texts, label])
        self._texts, self._label, self._tokenize, self._classes = texts, label, tokenize, classes

    def targets(self) -> np.ndarray | None:
        """Classes of the rows, for data.split, data.sampling and class weights."""
        return self._classes.targets(Column(self._rows, "", self._label))

    def longest(self) -> dict[str, Tensor]:
        """Inputs of the longest item that may be, of the largest token; a model is tried on it at set-up.

        It begins and ends as the first item does: some models, such as BART, read a text at its end token.
        """
        values = {"input_ids": self._tokenize.largest, "attention_mask": 1}
        first, length = self[0][0], self._tokenize.max_length
        made = {name: torch.full((length,), values.get(name, 0)) for name in first}
        for place in (0, -1) if "input_ids" in made else ():
            made["input_ids"][place] = first["input_ids"][place]
        return made

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Any]:
        row = self._rows[int(index)]
        tokens, places = self._tokenize([row[column] for column in self._texts])
        inputs = {name: torch.tensor(values, dtype=torch.int64) for name, values in tokens.items()}
        target = self._classes.of(row[self._label])
        return inputs, _of_tokens(target, places) if isinstance(target, list) else target


def _of_tokens(target: Sequence[int], places: Sequence[int | None]) -> Tensor:
    """Classes of tokens by those of words; `places` has each token's word."""
    pairs = zip(places, [None, *places], strict=False)  # each with the one before it
    found = [IGNORED if place is None or place == last else target[place] for place, last in pairs]
    return torch.tensor(found, dtype=torch.int64)


class Images(Dataset[Any]):
    """Rows of images; an item is (uint8 RGB [3, size, size], class)."""

    def __init__(self, rows: Any, image: str, label: str, size: int, resize: int, classes: Classes) -> None:
        self._rows = rows.select_columns([image, label])
        self._image, self._label, self._resize, self._classes = image, label, resize, classes
        self.input_shape = (3, size, size)

    def targets(self) -> np.ndarray | None:
        """Classes of the rows, for data.split, data.sampling and class weights."""
        return self._classes.targets(Column(self._rows, "", self._label))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row, (_, height, width) = self._rows[int(index)], self.input_shape
        pixels = functional.pil_to_tensor(row[self._image].convert("RGB"))
        return centre(pixels, height, width, self._resize), self._classes.of(row[self._label])
