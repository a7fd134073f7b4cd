"""Datasets of other people: items are taken or refused by name, and their errors become ours."""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, Subset

from dist_train.data import shared_memory, stack
from dist_train.data.arrays import Batch
from dist_train.data.augment.steps import Augmentation
from dist_train.data.items import OriginalTraceback, item_of, reading
from dist_train.data.loader import EvaluationLoader, Source
from dist_train.data.splits import Splits
from dist_train.data.workers import received
from dist_train.errors import CorruptSampleError, DataError
from dist_train.tasks import Classification
from dist_train.tasks.regression import Regression
from tests.support.raising_data import KINDS, PLANTED_AT, ROWS, Rows, Stream


class Planted(Dataset[Any]):
    """A row is (float32 [3, 2, 2], class); some rows are others."""

    def __init__(self, others: dict[int, Any]) -> None:
        self._others = others

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        return self._others.get(index, (torch.full((3, 2, 2), float(index)), index % 2))


class Streamed(IterableDataset[Any]):
    def __init__(self, rows: Dataset[Any]) -> None:
        self._rows = rows

    def __iter__(self) -> Any:
        return (self._rows[index] for index in range(16))


def batches(dataset: Any, workers: int = 0, rows: int = 8, check: Any = None) -> list[Batch]:
    augmentation = Augmentation([], seed=0, mean=(0.5,) * 3, std=(0.25,) * 3)
    size = 16 if isinstance(dataset, IterableDataset) else None
    source = Source(dataset, augmentation, torch.device("cpu"), False, workers, 0, size=size, check_targets=check)
    return list(EvaluationLoader(source, rows, 1, 0))


def refusal(dataset: Any, workers: int = 0, check: Any = None) -> DataError:
    """Returns the error of reading the dataset, without the frames, which would keep its workers alive."""
    try:
        batches(dataset, workers, check=check)
    except DataError as error:
        return error.with_traceback(None)
    raise AssertionError("it was read without an error")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("said", KINDS)
def test_an_error_of_an_item_is_named_with_its_place_and_its_traceback(said: str, workers: int) -> None:
    error = refusal(Rows("item", KINDS[said]), workers)
    assert error.message.startswith(f"item {PLANTED_AT} of Rows: {said}"), error.message
    assert "raising_data.py:" in error.message and error.hint
    cause = error.__cause__
    assert isinstance(cause, OriginalTraceback) and "in __getitem__" in "".join(traceback.format_exception(cause))


# A StopIteration of an iterator ends a stream; that of a generator is a RuntimeError by Python's own rule.
_NOT_IN_A_GENERATOR = {"StopIteration": "RuntimeError: generator raised StopIteration"}


@pytest.mark.parametrize("said", KINDS)
def test_an_error_of_a_stream_is_named(said: str) -> None:
    for place, what in (("iter", "the stream of Stream"), ("next", f"item {PLANTED_AT} of Stream")):
        error = refusal(Stream(place, KINDS[said]))
        expected = _NOT_IN_A_GENERATOR.get(said, said) if place == "next" else said
        assert error.message.startswith(f"{what}: {expected}"), error.message


@pytest.mark.parametrize("said", KINDS)
def test_an_error_of_the_length_or_of_the_datasets_function_is_named(said: str) -> None:
    with pytest.raises(DataError, match="the length of Rows: ") as caught:
        Splits(Rows("len", KINDS[said]), Rows(), 2)
    assert said in caught.value.message
    with pytest.raises(DataError, match="the dataset mine: ") as caught, reading("the dataset mine"):
        Rows("init", KINDS[said])
    assert said in caught.value.message and caught.value.__cause__ is not None


def test_what_a_user_typed_is_not_turned_into_an_error_of_the_dataset() -> None:
    with pytest.raises(KeyboardInterrupt), reading("the dataset mine"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["map", "subset", "stream"])
def test_items_of_two_shapes_are_named_with_both(kind: str, workers: int) -> None:
    rows: Any = Planted({5: (torch.zeros(3, 4, 2), 1)})
    dataset = {"map": rows, "subset": Subset(rows, list(range(16))), "stream": Streamed(rows)}[kind]
    name = {"map": "Planted", "subset": "Subset of Planted", "stream": "Streamed"}[kind]
    said = f"items 0 and 5 of {name} are not alike: their inputs have shapes [3, 2, 2] and [3, 4, 2]"
    error = refusal(dataset, workers)
    assert error.message == said and "Resize" in error.hint


@pytest.mark.parametrize(
    ("others", "said", "hint"),
    [
        ({6: (torch.zeros(1, 2, 2), 1)}, "items 0 and 6 of Planted are not alike: their inputs", 'convert("RGB")'),
        ({6: (torch.zeros(3, 2, 2, dtype=torch.uint8), 1)}, "inputs have dtypes float32 and uint8", "one dtype"),
        ({6: (torch.zeros(3, 2, 2), torch.zeros(2))}, "their targets have shapes [] and [2]", "one shape"),
        ({6: (PIL.Image.new("RGB", (2, 2)), 0)}, "the input of item 6 of Planted is a PIL image", "ToImage()"),
        ({6: ({"image": 1, "mask": 2}, 0)}, "inputs are a tensor and a tree of image, mask", "the same inputs"),
        ({6: (torch.zeros(3, 2, 2), {"box": 1})}, "targets are a tensor and a tree of box", "the same targets"),
        ({6: (torch.zeros(3, 2, 2), (1, 2))}, "the target of item 6 of Planted is a tuple of 2", "torch.tensor("),
        ({6: (torch.zeros(3, 2, 2), "cat")}, "the target of item 6 of Planted is a str", "index of the class"),
        ({6: (torch.zeros(3, 2, 2), None)}, "the target of item 6 of Planted is None", "a number"),
        (
            {6: (torch.zeros(3, 2, 2).to_sparse(), 0)},
            "the input of item 6 of Planted is a tensor of another layout",
            "to_dense",
        ),
        ({6: (torch.zeros(3, 2, 2).long(), 0)}, "their inputs have dtypes float32 and int64", "one dtype"),
        ({6: (np.array(["a"]), 0)}, "the input of item 6 of Planted is a ndarray", "one tensor"),
        ({6: None}, "item 6 of Planted is None, not a pair", "CorruptSampleError"),
        ({6: (torch.zeros(3, 2, 2), 2**70)}, f"the target of item 6 of Planted is {2**70}, and", "index of the class"),
        ({6: (torch.zeros(3, 2, 2), np.uint64(2**63))}, f"the target of item 6 of Planted is {2**63}, and", "index"),
    ],
)
def test_items_that_cannot_be_taken_are_refused_with_what_to_return(
    others: dict[int, Any], said: str, hint: str
) -> None:
    for dataset in (Planted(others), Streamed(Planted(others))):
        error = refusal(dataset)
        assert said.replace("Planted", type(dataset).__name__) in error.message, error.message
        assert hint in error.hint


def test_batches_of_two_dtypes_are_refused() -> None:
    others = {index: (torch.zeros(3, 2, 2, dtype=torch.uint8), 0) for index in range(8, 16)}
    with pytest.raises(
        DataError, match="items 0 and 8 of Planted are not alike: their inputs have dtypes float32 and uint8"
    ):
        batches(Planted(others))


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ((torch.zeros(3, 4, 4), 0), "their inputs have shapes [3, 2, 2] and [3, 4, 4]"),
        ((torch.zeros(3, 2, 2), torch.zeros(2)), "their targets have shapes [] and [2]"),
    ],
)
def test_batches_of_two_shapes_are_refused(item: Any, said: str) -> None:
    error = refusal(Planted(dict.fromkeys(range(8, 16), item)))
    assert error.message == f"items 0 and 8 of Planted are not alike: {said}" and "one shape" in error.hint


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "made",
    [
        int,
        bool,
        np.int32,
        np.uint8,
        np.uint16,
        np.bool_,
        lambda y: np.array(y, dtype=">i2"),
        lambda y: torch.tensor(y, dtype=torch.int8),
        lambda y: torch.tensor(bool(y)),
    ],
)
def test_classes_of_any_integer_type_are_int64(made: Callable[[int], Any], workers: int) -> None:
    dataset = Planted({index: (torch.zeros(3, 2, 2), made(index % 2)) for index in range(16)})
    task = Classification(2, {})
    for batch in batches(dataset, workers, check=task.check_targets):
        assert batch.targets.dtype == torch.int64 and batch.targets.tolist() == [0, 1] * 4
        task.metrics().update(torch.rand(8, 2), batch.targets)
        torch.testing.assert_close(task.loss(torch.zeros(8, 2), batch.targets), torch.full((8,), math.log(2)))


@pytest.mark.parametrize("made", [float, np.float64, np.float16, int, np.int16, lambda y: torch.tensor([y]).double()])
def test_numbers_of_any_type_are_regressed(made: Callable[[float], Any]) -> None:
    dataset = Planted({index: (torch.zeros(3, 2, 2), made(index / 4)) for index in range(16)})
    task, outputs = Regression(1, {}), torch.zeros(8, 1, requires_grad=True)
    for batch in batches(dataset, check=task.check_targets):
        loss = task.loss(outputs, batch.targets)
        loss.sum().backward()
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.detach(), batch.targets.float().flatten() ** 2)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("task", "target", "said"),
    [
        (Classification(2, {}), 1.5, "item 11 of Planted: classification takes targets int64 [N]"),
        (Classification(2, {}), math.nan, "item 11 of Planted: classification takes targets int64 [N]"),
        (Classification(2, {}), 2, "item 11 of Planted: targets must lie in range(2), got 2..2"),
        (Regression(1, {}), math.nan, "item 11 of Planted: regression targets must be finite"),
    ],
)
def test_a_target_that_does_not_suit_the_task_is_named_with_its_item(
    task: Any, target: Any, said: str, workers: int
) -> None:
    error = refusal(Planted({11: (torch.zeros(3, 2, 2), target)}), workers, check=task.check_targets)
    assert said in error.message and error.hint


@pytest.mark.parametrize(
    "given",
    [
        torch.rand(3, 2, 2, requires_grad=True) * 2,  # a worker cannot send its graph
        np.random.default_rng(0).random((3, 2, 2))[:, ::-1],  # flipped
        np.random.default_rng(0).random((3, 2, 2)).astype(">f4"),
        np.broadcast_to(np.float16(0.5), (3, 2, 2)),
        torch.rand(3, 2, 2, dtype=torch.float64),
        torch.rand(3, 2, 2).half(),
    ],
)
def test_inputs_of_any_float_type_and_layout_are_float32(given: Any) -> None:
    expected = torch.tensor(np.array(given.detach() if isinstance(given, torch.Tensor) else given, dtype=np.float32))
    for workers in (0, 1):
        (first, _) = batches(Planted(dict.fromkeys(range(16), (given, 0))), workers)
        assert first.inputs.dtype == torch.float32 and torch.equal(first.inputs[3], expected)


def test_a_corrupt_first_item_does_not_hide_the_shape() -> None:
    class Corrupt(Planted):
        def __getitem__(self, index: int) -> Any:
            if index < 2:
                raise CorruptSampleError("cannot be decoded")
            return super().__getitem__(index)

    assert Splits(Corrupt({}), Corrupt({}), 2).input_shape == (3, 2, 2)


def test_a_split_that_is_no_dataset_is_refused() -> None:
    loader: Any = torch.utils.data.DataLoader(Rows(), batch_size=2)
    with pytest.raises(DataError, match="Splits.train is a DataLoader, not a dataset") as caught:
        Splits(loader, Rows(), 2)
    assert "without a DataLoader" in caught.value.hint


def test_shared_memory_that_is_full_is_named_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(items: Any) -> Any:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(stack, "default_collate", full)
    for dataset in (Planted({}), Streamed(Planted({}))):
        error = refusal(dataset, workers=1)
        assert re.search("/dev/shm: .* free", error.message)
        assert f"a batch of 8 items of {type(dataset).__name__}" in error.message
        assert "--shm-size" in error.hint and "--data.workers 0" in error.hint
    assert len(batches(Planted({}))) == 2, "no worker, no shared memory"


@pytest.mark.parametrize(
    ("error", "said", "hint"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. "), "/dev/shm", "--shm-size"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "ended", "--data.workers 1"),
        (RuntimeError("received 0 items of ancdata"), "too many files", "ulimit -n"),
        (OSError(24, "Too many open files"), "too many files", "ulimit -n"),
    ],
)
def test_an_end_of_worker_processes_is_named(error: Exception, said: str, hint: str) -> None:
    def ends() -> Any:
        yield 1
        raise error

    with pytest.raises(DataError) as caught:
        list(received(ends))
    assert said in caught.value.message and hint in caught.value.hint


def test_the_need_of_shared_memory_counts_the_batches_made_ahead() -> None:
    assert shared_memory.needed(0, 100) == 0
    assert shared_memory.needed(2, 100) == (2 * shared_memory.PREFETCH + 1) * 100


def test_an_item_keeps_its_masks_small() -> None:
    mask = torch.ones(4, 4, dtype=torch.uint8)
    assert item_of(0, (torch.zeros(1), mask), Rows()).target.dtype == torch.uint8
    assert len(Rows()) == ROWS
