"""Small nets that take and return trees of tensors, with rows for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_train.trees import Tree

WORDS, CLASSES = 50, 4
DYNAMIC = {"input_ids": {1: "sequence"}, "attention_mask": {1: "sequence"}}


class TextNet(nn.Module):
    """Classifies sequences of words [B, S], where the mask is 1."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.inner, self.score = nn.Linear(width, width), nn.Linear(width, 1)
        self.head = nn.Linear(width, CLASSES)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """float32 [B, width]."""
        words = torch.relu(self.inner(self.embedding(input_ids)))
        scores = self.score(words).squeeze(-1) + (1.0 - attention_mask.to(words.dtype)) * -1e4
        return (scores.softmax(-1).unsqueeze(-1) * words).sum(1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, CLASSES]."""
        logits: Tensor = self.head(self.hidden(input_ids, attention_mask))
        return logits


@dataclass
class Answer:
    """Outputs as a library's own class."""

    logits: Tensor
    hidden: Tensor
    nothing: Tensor | None = None


class AnsweringNet(TextNet):
    """As TextNet; returns an `Answer`."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Answer:  # type: ignore[override]
        hidden = self.hidden(input_ids, attention_mask)
        return Answer(self.head(hidden), hidden)


class DictNet(TextNet):
    """As TextNet; returns a dict of two tensors."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        hidden = self.hidden(input_ids, attention_mask)
        return {"logits": self.head(hidden), "hidden": hidden}


class PairNet(nn.Module):
    """Takes two tensors by position, [B, 8] and [B, 4]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(8, width), nn.Linear(4, width), nn.Linear(width, CLASSES)

    def forward(self, left: Tensor, right: Tensor, scale: Tensor | None = None) -> Tensor:
        """Logits [B, CLASSES]."""
        joined = torch.relu(self.left(left)) + torch.relu(self.right(right))
        logits: Tensor = self.head(joined if scale is None else joined * scale)
        return logits


def seeded(kind: type[nn.Module]) -> nn.Module:
    """A net in eval mode with seeded weights, whose logits are far enough apart for a stable argmax."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = kind()
    head = net.get_submodule("head")
    assert isinstance(head, nn.Linear)
    head.weight.data *= 8
    return net.eval()


def texts(rows: int, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Rows of words, the first one whole, the others padded."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length + 1, (rows, 1), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": torch.randint(1, WORDS, (rows, length), generator=generator) * mask, "attention_mask": mask}


def pairs(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows for PairNet."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 8, generator=generator), torch.randn(rows, 4, generator=generator)


def batches_of(net: nn.Module) -> list[Tree]:
    """Batches of one and five rows; of texts also another length."""
    if isinstance(net, PairNet):
        return [pairs(1, 1), pairs(5, 2)]
    return [texts(1, 7, 1), texts(5, 7, 2), texts(5, 11, 3), texts(1, 4, 4)]
