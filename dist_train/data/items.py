"""Items of other people's datasets: makes tensors of them, or names dataset and item in an error.

All code of a dataset that is not ours runs inside `reading`.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from dist_train.errors import CorruptSampleError, DataError, DistTrainError, told

_PAIR = "return (tensor, target) from the dataset"
LEAVE_OUT = (
    "correct it there; for items that may be left out (--data.on_corrupt skip), "
    "raise dist_train.errors.CorruptSampleError instead"
)


def name_of(dataset: object) -> str:
    """Returns the name of a dataset's class, for messages."""
    inner = f" of {name_of(dataset.dataset)}" if isinstance(dataset, Subset) else ""
    return type(dataset).__name__ + inner


@contextmanager
def reading(what: str, hint: str = "correct it there") -> Iterator[None]:
    """Turns an error of a dataset's own code in the body into one that names `what`; its cause stays attached.

    Raises:
        DataError: the body raised any error but KeyboardInterrupt; a DistTrainError stays as it is.
    """
    try:
        yield
    except DistTrainError:
        raise
    except (Exception, SystemExit) as error:  # the code is another's: it may raise anything
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
    """An item: `id` is its index; the input is float32 or uint8, the target as `_target` returns it."""

    id: int
    input: Tensor
    target: Tensor


def item_of(index: int, given: Any, dataset: object) -> Item:
    """Makes an item from a dataset's answer.

    Raises:
        DataError: it is not a pair of an input and a target that can be taken; the hint says what to return.
    """
    what = f"item {index} of {name_of(dataset)}"
    if not (isinstance(given, (tuple, list)) and len(given) == 2):
        hint = _PAIR
        if given is None:
            hint = f"{_PAIR}; for an item to leave out, raise dist_train.errors.CorruptSampleError"
        raise DataError(f"{what} is {_kind(given)}, not a pair (input, target)", hint)
    with reading(what, LEAVE_OUT):
        return Item(index, _input(given[0], f"the input of {what}"), _target(given[1], f"the target of {what}"))


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


def _input(value: Any, what: str) -> Tensor:
    tensor = _tensor(value)
    if tensor is None:
        hint = "return one tensor, for example by torchvision.transforms.v2.ToImage() at the end of the transforms"
        if isinstance(value, (dict, tuple, list)):
            hint = "return one tensor, for example torch.cat or torch.stack of the parts, which the model takes apart"
        raise DataError(f"{what} is {_kind(value)}, not a tensor", hint)
    if tensor.is_floating_point():
        return tensor.float()
    if tensor.dtype != torch.uint8:
        raise DataError(
            f"{what} has dtype {short(tensor.dtype)}: inputs are float tensors, or uint8 images. With floats the "
            "model is tried, quantized and exported",
            "return the tensor's .float(); a model of tokens embeds them with ids.long() in its forward",
        )
    return tensor


def _target(value: Any, what: str) -> Tensor:
    """Returns a target as float32 or int64; uint8 and bool are kept where the target has dimensions (masks)."""
    tensor = torch.tensor(value) if isinstance(value, (bool, int, float)) else _tensor(value)
    if tensor is None or tensor.is_complex():
        hint = "return a number, or a tensor of numbers"
        if isinstance(value, (tuple, list)):
            hint = "return torch.tensor([...]) for several numbers; one target a sample is taken"
        elif isinstance(value, dict):
            hint = "return the one entry to train on; one target a sample is taken"
        elif isinstance(value, (str, bytes)):
            hint = "return the index of the class, and give Splits the names of the classes"
        raise DataError(f"{what} is {_kind(value)}, not a number or a tensor", hint)
    if tensor.is_floating_point():
        return tensor.float()
    return tensor if tensor.dim() and tensor.dtype in (torch.uint8, torch.bool) else tensor.long()


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
