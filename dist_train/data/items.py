"""Items of other people's datasets: makes tensors of them, or names dataset and item in an error.

All code of a dataset that is not ours runs inside `reading`.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from dist_train.errors import STOPS, CorruptSampleError, DataError, DistTrainError, told
from dist_train.trees import Tree, named_leaves

_PAIR = "return (tensor, target) from the dataset"
LEAVE_OUT = (
    "correct it there; for items that may be left out (--data.on_corrupt skip), "
    "raise dist_train.errors.CorruptSampleError instead"
)


def name_of(dataset: object) -> str:
    """Returns the name of a dataset's class, for messages."""
    inner = dataset.dataset if isinstance(dataset, Subset) else getattr(dataset, "whole", None)  # of a `Part`
    return type(dataset).__name__ + (f" of {name_of(inner)}" if isinstance(inner, Dataset) else "")


@contextmanager
def reading(what: str, hint: str = "correct it there") -> Iterator[None]:
    """Turns an error of a dataset's own code in the body into one that names `what`; its cause stays attached.

    Raises:
        DataError: the body raised any error but KeyboardInterrupt; a DistTrainError stays as it is.
    """
    try:
        yield
    except (DistTrainError, *STOPS):
        raise
    except BaseException as error:  # the code is another's: it may raise anything
        if isinstance(error, MemoryError):
            hint = "use fewer worker processes (--data.workers 1), or a machine with more memory"
        raise DataError(f"{what}: {told(error)}", hint) from error


class OriginalTraceback(Exception):
    """The text of a traceback in a dataset's code. A worker process cannot send every error itself."""


class Failure:
    """An item's error, sent from a worker as data: a DataLoader would turn it into a traceback."""

    def __init__(self, error: DistTrainError) -> None:
        self.corrupt = isinstance(error, CorruptSampleError)
        self.message, self.hint = error.message, error.hint
        self._traceback = "".join(traceback.format_exception(error)) if error.__cause__ is not None else ""

    def throw(self) -> NoReturn:
        """Raises the error, in the rank's process."""
        kind = CorruptSampleError if self.corrupt else DataError
        cause = OriginalTraceback(f"\n{self._traceback}") if self._traceback else None
        raise kind(self.message, self.hint) from cause


@dataclass(frozen=True)
class Item:
    """An item: `id` is its index. Leaves are as `leaf_of` makes them, or as the dataset gave them for a `collate`.

    Attributes:
        batch: memory of which the input is a row, at the item's place among those that were asked for.
        epoch: in which it was read; -1 for an evaluation.
    """

    id: int
    input: Tree
    target: Tree
    batch: Tensor | None = None
    epoch: int = -1


def item_of(index: int, given: Any, dataset: object, raw: bool = False, epoch: int = -1) -> Item:
    """Makes an item from a dataset's answer.

    raw: leave input and target as they are, for a `collate` that makes tensors of them.

    Raises:
        DataError: it is not a pair of an input and a target that can be taken; the hint says what to return.
    """
    what = f"item {index} of {name_of(dataset)}"
    if not (isinstance(given, (tuple, list)) and len(given) == 2):
        hint = _PAIR
        if given is None:
            hint = f"{_PAIR}; for an item to leave out, raise dist_train.errors.CorruptSampleError"
        raise DataError(f"{what} is {_kind(given)}, not a pair (input, target)", hint)
    if raw:
        return Item(index, given[0], given[1], epoch=epoch)
    with reading(what, LEAVE_OUT):
        return Item(index, inputs_of(given[0], what), targets_of(given[1], what), epoch=epoch)


def inputs_of(value: Any, what: str) -> Tree:
    """Makes the inputs of an item or of a batch: a tensor, or a tree of tensors with plain dicts and tuples.

    what: names the item or the batch, as "item 3 of Rows".
    """
    if isinstance(value, Tensor):
        return leaf_of(value, f"the input of {what}", _INPUT)
    tree = _tree(value, "inputs", what, _INPUT)
    if isinstance(tree, dict):
        wrong = next((key for key in tree if not isinstance(key, str)), None)
        if wrong is not None:
            raise DataError(
                f"the inputs of {what} have the key {wrong!r}, and a model takes a dict by keywords",
                "give names of the arguments of its forward",
            )
    return tree


def targets_of(value: Any, what: str) -> Tree:
    """Makes the targets of an item or of a batch, as `inputs_of` makes inputs."""
    return _tree(value, "targets", what, _TARGET)


def _kind(value: Any) -> str:
    """Describes a value of a wrong type: "a dict (image, mask)"."""
    if value is None:
        return "None"
    inside = ""
    if isinstance(value, dict):
        inside = f" ({', '.join(str(key) for key in list(value)[:5])})"
    elif isinstance(value, (tuple, list)):
        inside = f" of {len(value)}"
    word = "PIL image" if type(value).__module__.startswith("PIL.") else type(value).__name__
    return f"{'an' if word[:1].lower() in 'aeiou' else 'a'} {word}{inside}"


_INPUT, _TARGET = "input", "target"


def _tree(value: Any, name: str, what: str, part: str) -> Tree:
    """Makes tensors of the leaves, and plain dicts and tuples of what holds them."""
    if isinstance(value, Mapping):
        made: Tree = {key: _tree(each, f"{name}.{key}", what, part) for key, each in value.items()}
    elif isinstance(value, (tuple, list)):
        if value and all(isinstance(each, (int, float)) for each in value):
            hint = "return torch.tensor([...]) for several numbers"
            raise DataError(f"{_leaf(name, what, part)} is {_kind(value)}, not {_WANTED[part]}", hint)
        made = tuple(_tree(each, f"{name}.{place}", what, part) for place, each in enumerate(value))
    else:
        return leaf_of(value, _leaf(name, what, part), part)
    if not value:
        message = f"{_leaf(name, what, part)} is an empty {type(value).__name__}"
        raise DataError(message, "leave it out, or give it a tensor")
    if "." not in name:
        names = [each for each, _ in named_leaves(made)]
        twice = next((each for each in names if names.count(each) > 1), None)
        if twice is not None:
            raise DataError(f"two leaves of the {part} of {what} are named {twice}", "use keys without a dot")
    return made


def _leaf(name: str, what: str, part: str) -> str:
    """Returns "the input of item 3 of Rows" for a tensor alone, "inputs.mask of item 3 of Rows" for a leaf."""
    return f"{name} of {what}" if "." in name else f"the {part} of {what}"


def leaf_of(value: Any, what: str, part: str) -> Tensor:
    """Makes a tensor of a leaf: float32, int64 or bool. Unsigned bytes stay, of images and of masks.

    Raises:
        DataError: it is no number and no tensor of numbers; the hint says what to return.
    """
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise _too_large(value, what)
    tensor = torch.tensor(value) if isinstance(value, (bool, int, float)) else _tensor(value)
    if isinstance(value, Tensor) and (tensor is None or tensor.is_complex() or tensor.is_meta):
        other = next((each for each in _OTHER if each[0](value)), _OTHER[-1])
        raise DataError(f"{what} is a tensor {other[1]}, and batches hold dense real numbers", other[2])
    if tensor is None or tensor.is_complex():
        raise DataError(f"{what} is {_kind(value)}, not {_WANTED[part]}", _leaf_hint(value, part))
    if tensor.is_floating_point():
        return tensor.float()
    if tensor.dtype == torch.uint64 and tensor.numel() and int(tensor.view(torch.int64).min()) < 0:
        raise _too_large(max(tensor.flatten().tolist()), what)
    if tensor.dtype in (torch.uint8, torch.bool) and (tensor.dim() or (part == _INPUT and tensor.dtype == torch.bool)):
        return tensor
    return tensor.long()


# Tensors that are not taken: which, their description, and what to return.
_OTHER: tuple[tuple[Callable[[Tensor], bool], str, str], ...] = (
    (lambda tensor: tensor.is_complex(), "of complex numbers", "return torch.view_as_real(tensor)"),
    (lambda tensor: tensor.is_meta, "on the device meta, without numbers", "return tensors on the CPU"),
    (lambda tensor: True, "of another layout, as sparse", "return tensor.to_dense()"),
)
_WANTED = {_INPUT: "a tensor", _TARGET: "a number or a tensor"}


def _leaf_hint(value: Any, part: str) -> str:
    if part == _INPUT:
        if value is None or isinstance(value, (str, bytes)):
            return "return one tensor, or a dict or tuple of tensors for the model; Splits.collate may make them"
        return "return one tensor, for example by torchvision.transforms.v2.ToImage() at the end of the transforms"
    if isinstance(value, (str, bytes)):
        return "return the index of the class, and give Splits the names of the classes"
    return "return a number, or a tensor of numbers"


def _too_large(value: int, what: str) -> DataError:
    return DataError(
        f"{what} is {value}, and integers have 64 bits with a sign here",
        "return the index of the class, 0 .. num_classes - 1; for an amount a float, with --task.name regression",
    )


def _tensor(value: Any) -> Tensor | None:
    """Returns a dense tensor of a tensor, an array or a numpy scalar of numbers; None for anything else."""
    if isinstance(value, Tensor):
        # Without its graph, which a worker process could not send.
        return value.detach() if value.layout == torch.strided else None
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufc":
        array = np.asarray(value)
        # torch takes no negative strides (flipped images), no other byte order (FITS, TIFF), and no read-only memory.
        native = array.astype(array.dtype.newbyteorder("="), copy=False)
        usable = native.flags.writeable and all(stride >= 0 for stride in native.strides)
        return torch.from_numpy(native if usable else native.copy())
    return None


def short(dtype: torch.dtype) -> str:
    """Returns "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def rows_in(dataset: object) -> int:
    """Returns the length of a map-style dataset.

    Raises:
        DataError: it has none.
    """
    with reading(f"the length of {name_of(dataset)}", "give the dataset a __len__ that returns its number of items"):
        return len(cast(Any, dataset))
