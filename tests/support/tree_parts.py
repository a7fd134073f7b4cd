"""Data, models and tasks whose batches are trees: texts with a mask, pairs of tensors, counted losses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

import dist_train
from dist_train.errors import CorruptSampleError
from dist_train.tasks.counter import Counts

CLASSES, WORDS, LENGTH = 3, 11, 5


class Texts(Dataset[Any]):
    """Items ({"ids": int64 [LENGTH], "mask": bool [LENGTH]}, class); or of unlike lengths, and then without a mask."""

    def __init__(self, size: int, ragged: bool = False, damaged: tuple[int, ...] = ()) -> None:
        generator = torch.Generator().manual_seed(size)
        self._lengths = torch.randint(1, LENGTH + 1, (size,), generator=generator).tolist()
        self._words = torch.randint(1, WORDS, (size, LENGTH), generator=generator)
        self._ragged, self._damaged = ragged, damaged

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> Any:
        if index in self._damaged:
            raise CorruptSampleError(f"{index}.txt cannot be decoded")
        length, words = self._lengths[index], self._words[index]
        target = int(words[:length].sum()) % CLASSES
        if self._ragged:
            return {"ids": words[:length].to(torch.int32)}, target
        mask = torch.arange(LENGTH) < length
        return {"ids": words * mask, "mask": mask}, target


def padded(items: list[Any]) -> tuple[Any, Any]:
    """Pads to the longest text of the batch."""
    lengths = torch.tensor([len(inputs["ids"]) for inputs, _ in items])
    ids = pad_sequence([inputs["ids"] for inputs, _ in items], batch_first=True)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return {"ids": ids, "mask": mask}, torch.tensor([target for _, target in items])


class Bag(nn.Module):
    """The mean of the embeddings of a text's words, and a linear layer on it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, 8), nn.Linear(8, CLASSES)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        hidden = (self.embed(ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return {"logits": self.head(hidden)}


class TwoHeads(Bag):
    """A Bag with a second head that no built-in task takes; what it masks is -inf."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(8, CLASSES)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        second = self.second(self.embed(ids)).masked_fill(~mask[..., None], -torch.inf)
        return {**super().forward(ids, mask), "second": second}


class Pairs(Dataset[Any]):
    """Items ((float64 [4], int8 number), class)."""

    def __init__(self, size: int) -> None:
        self._values = torch.randn(size, 4, generator=torch.Generator().manual_seed(size), dtype=torch.float64)

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: int) -> Any:
        values = self._values[index]
        return (values, torch.tensor(index % WORDS, dtype=torch.int8)), int(values.sum() > 0)


class Pair(nn.Module):
    """A model that takes its inputs by position, and returns a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, 4), nn.Linear(8, CLASSES)

    def forward(self, values: Tensor, place: Tensor) -> Tensor:
        out: Tensor = self.head(torch.cat([values, self.embed(place)], 1))
        return out


class Counted(dist_train.Task):
    """Tells the words' parity: the loss is a sum over words, counted by them, of outputs [B, L, 2]."""

    headline = "loss"

    def __init__(self, num_outputs: int, args: dict[str, Any]) -> None:
        return

    def summed_loss(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        losses = F.cross_entropy(outputs["words"].transpose(1, 2), targets["parity"], reduction="none")
        return (losses * targets["mask"]).sum(), targets["mask"].sum()

    def score(self, outputs: Any, targets: Any) -> Tensor:
        right = (outputs["words"].argmax(2) == targets["parity"]) & targets["mask"]
        return right.sum(1) / targets["mask"].sum(1)

    def decide(self, outputs: Any) -> Tensor:
        return outputs["words"].argmax(2)

    def metrics(self) -> Counts:
        return Counts({})


class Words(Texts):
    """Items whose targets are a tree: a parity for each word, and which of them count."""

    def __getitem__(self, index: int) -> Any:
        inputs, _ = super().__getitem__(index)
        return inputs, {"parity": inputs["ids"] % 2, "mask": inputs["mask"]}


class Tagger(nn.Module):
    """Scores [B, L, 2] of each word."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, 6), nn.Linear(6, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"words": self.head(self.embed(ids)), "kept": mask.sum(1)}


@dist_train.register_dataset("texts")
def texts(data: dist_train.DataConfig) -> dist_train.Splits:
    ragged = data.args.get("ragged", False)
    train, evaluation = Texts(data.args.get("size", 47), ragged), Texts(19, ragged)
    if ragged:
        return dist_train.Splits(
            train,
            evaluation,
            CLASSES,
            collate=padded,
            dynamic={"ids": {1: "words"}, "mask": {1: "words"}},
        )
    return dist_train.Splits(train, evaluation, CLASSES)


@dist_train.register_model("bag")
def bag() -> nn.Module:
    return Bag()
