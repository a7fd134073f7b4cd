"""Task: the base class for loss, score and metrics of a kind of problem."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeVar

import torch
from pydantic import ValidationError
from torch import nn

from dist_train.config.base import Settings
from dist_train.errors import ConfigError, DataError, ModelError, Problem
from dist_train.tasks.counter import Counts
from dist_train.trees import Tree, named_leaves, plain

S = TypeVar("S", bound=Settings)


class Metrics(Protocol):
    """The metrics of an evaluation by name, such as a `torchmetrics.MetricCollection`."""

    def __iter__(self) -> Iterator[Any]:
        """Iterates over the metrics' names."""

    def to(self, device: torch.device) -> Any:
        """Moves the states to a device; returns the metrics."""

    def update(self, outputs: Any, targets: Any) -> None:
        """Adds a batch."""

    def compute(self) -> dict[str, Any]:
        """Returns each metric over the batches of all ranks, as a tensor. Collective."""


class Task(ABC):
    """Loss and metrics of a kind of problem.

    A model's outputs are a tensor or a tree of tensors (dist_train/trees.py): dicts, also for a ModelOutput or a
    dataclass, and tuples. `pick` takes from them what loss, score, decide and the metrics get. Targets are as the
    dataset or its `collate` gives them.

    A registered task is called with (num_outputs, args): `Splits.num_outputs` and the config's `task.args`. It is also
    called once without data, with any number, to check the arguments.
    """

    headline: str
    """The metric that chooses the best checkpoint, unless `select_by` names another."""

    lower_is_better: frozenset[str] = frozenset({"loss"})
    """Metrics whose smallest value is the best."""

    score_name: str = "acc"
    """The score's name on the progress line."""

    targets_follow_pixels: bool = False
    """True where targets are places in the image, as boxes, which augmentation that moves pixels must move too."""

    def for_model(self, model: nn.Module, inputs: Tree) -> None:
        """Takes from the built float model what the task must know of it, such as a detector's anchors.

        Called before the task gets outputs, with two rows of inputs as the model takes them. The model is in eval mode,
        and must stay as it is. Raises ModelError for one that does not suit the task.
        """
        return

    def described(self) -> dict[str, Any]:
        """Returns fields for an artifact's manifest, JSON: what is needed to make answers of the model's outputs."""
        return {}

    def pick(self, outputs: Tree) -> Any:
        """Picks what loss, score, decide and metrics get of a model's outputs: all of them, unless a task says less.

        It also gets its own answer.
        """
        return outputs

    def loss(self, outputs: Any, targets: Any) -> torch.Tensor:
        """Loss of each sample, float [B]. The loop averages it over the real samples of the global batch.

        A task whose loss is not one of each sample defines `summed_loss` instead.
        """
        raise NotImplementedError

    def summed_loss(self, outputs: Any, targets: Any) -> tuple[torch.Tensor, torch.Tensor | int]:
        """Sum of the losses of a micro-batch, float [], and their count, which may be anything: pairs, boxes, tokens.

        The loop minimizes the sum over the global batch divided by its count over the global batch. A loss between
        rows, as of a contrastive one, sees those of one micro-batch.
        """
        losses = self.loss(outputs, targets)
        return losses.sum(), len(losses)

    def sample_losses(self, outputs: Any, targets: Any) -> torch.Tensor | None:
        """Loss of each sample, float [B], by which a report chooses the worst ones; None: it shows none.

        For tasks that define `summed_loss`.
        """
        return None

    def draw(self, image: Any, scale: float, targets: Any, decision: torch.Tensor) -> None:
        """Draws a sample's target and decision on its picture in a report, a PIL image in RGB, in place.

        scale: pixels of the picture for each of the model's input. targets: those of the sample, without the batch.
        """
        return

    @property
    def sums_losses(self) -> bool:
        """True where the task defines `summed_loss`."""
        return type(self).summed_loss is not Task.summed_loss

    @abstractmethod
    def score(self, outputs: Any, targets: Any) -> torch.Tensor:
        """Score of each sample for the progress line, float [B]; for classification 1 where the answer is right."""

    @abstractmethod
    def decide(self, outputs: Any) -> torch.Tensor:
        """The model's answers, [B, ...], on which the int8 and the fake-quantized model must agree.

        Return numbers as floats: `agree` gets them in units of their spread.
        """

    def agree(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Agreement of two models' decisions about the same samples: float [B], 1 where they are the same.

        Float decisions come in units of their own spread: each output is divided by its standard deviation over the
        samples of all ranks.
        """
        return (left == right).float().flatten(1).mean(1) if left.dim() > 1 else (left == right).float()

    def check_outputs(self, outputs: Any) -> None:
        """Raises DataError where a model's outputs for two inputs, as `pick` gives them, cannot be right."""
        return

    def check_targets(self, targets: Any) -> None:
        """Raises DataError where targets [N, ...] do not suit this task.

        It gets all targets of a split of image arrays, else those of one batch after the other. They are float32,
        int64, or (masks) uint8 and bool, whatever numbers the dataset returns. It may run in worker processes.
        """
        return

    @abstractmethod
    def metrics(self) -> Metrics:
        """Makes the metrics of an evaluation, such as a `torchmetrics.MetricCollection`.

        They take (outputs, targets) and sum over ranks.
        """

    def details(self) -> Metrics:
        """Makes the metrics of a report that are not single numbers, such as a confusion matrix."""
        return Counts({})


def task_args(task: str, settings: type[S], args: Mapping[str, Any]) -> S:
    """Parses `task.args`.

    Raises:
        ConfigError: lists each mistake.
    """
    try:
        return settings(**args)
    except ValidationError as error:
        hint = f"{task} takes {', '.join(settings.model_fields)}"
        raise ConfigError(
            [
                Problem(".".join(["task", "args", *map(str, mistake["loc"])]), mistake["msg"], hint=hint)
                for mistake in error.errors()
            ]
        ) from None


_LOGITS = ("logits", "out")  # of Hugging Face's and torchvision's outputs


def one_output(outputs: Tree, task: str) -> torch.Tensor:
    """Picks the tensor of a task with one output: itself, `logits`, torchvision's `out`, or the only leaf of a tree.

    Auxiliary outputs beside `logits` or `out` do not count.

    Raises:
        ModelError: there are several, or none.
    """
    if isinstance(outputs, torch.Tensor):
        return outputs
    named = plain(outputs)
    if isinstance(named, Mapping):
        found = next((named[key] for key in _LOGITS if isinstance(named.get(key), torch.Tensor)), None)
        if found is not None:
            return found
    there = [(name or "a value", leaf) for name, leaf in named_leaves(named)]
    tensors = [leaf for _, leaf in there if isinstance(leaf, torch.Tensor)]
    if len(tensors) == 1:
        only: torch.Tensor = tensors[0]
        return only
    inside = ", ".join(name for name, _ in there)
    raise ModelError(
        f"the model returns a {type(outputs).__name__}{f' ({inside})' if inside else ''}, not a tensor: the task "
        f"{task} takes one, or `logits` or `out` among several",
        "return only the logits from its forward; or write a task whose pick() takes what it needs (docs/your-own.md)",
    )


def require_tensor(targets: Any, task: str) -> None:
    """Raises DataError where targets are a tree, and the task takes one tensor."""
    if not isinstance(targets, torch.Tensor):
        names = ", ".join(name for name, _ in named_leaves(targets))
        raise DataError(
            f"{task} takes targets that are one tensor, but the data's are a tree of {names}",
            "return the one entry to train on; or write a task that takes all of them (docs/your-own.md)",
        )


def wrong_targets(task: str, wanted: str, targets: torch.Tensor, hint: str | None = None) -> DataError:
    """Makes the error for targets of another kind; `hint` takes the place of the advice to choose another task."""
    shape = ", ".join(["N", *map(str, targets.shape[1:])])
    found = f"{str(targets.dtype).removeprefix('torch.')} [{shape}]"
    return DataError(
        f"{task} takes targets {wanted}, but the data's are {found}",
        hint
        or "--task.name with the data's own task (classification, multilabel, regression, segmentation, tokens), or "
        "other data",
    )


def require_classes(targets: torch.Tensor, num_classes: int, ignored: int | None = None) -> None:
    """Raises DataError where class indices other than `ignored` lie outside range(num_classes)."""
    real = targets if ignored is None else targets[targets != ignored]
    if not real.numel():
        return
    low, high = int(real.min()), int(real.max())
    if low < 0 or high >= num_classes:
        besides = "" if ignored is None else f", or be task.args.ignore_index ({ignored})"
        raise DataError(
            f"targets must lie in range({num_classes}){besides}, got {low}..{high}",
            "num_classes of the dataset is the number of its classes",
        )
