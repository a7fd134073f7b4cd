"""Batches that are trees: leaves keep their kind, are named where they are wrong, and come from real rows."""

from __future__ import annotations

import re
from collections import UserDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from dist_train import trees
from dist_train.data.arrays import Batch, ImageArrays
from dist_train.data.augment.steps import Augmentation
from dist_train.data.content import is_random, read_content
from dist_train.data.loader import EstimationLoader, EvaluationLoader, Source, TrainLoader
from dist_train.data.sampler import ElasticDistributedSampler
from dist_train.data.splits import Splits, describe_data
from dist_train.errors import CorruptSampleError, DataError
from tests.support.tree_parts import LENGTH, Pairs, Texts, padded


class Given(Dataset[Any]):
    """Items as a list gives them; an error in it is raised."""

    def __init__(self, items: list[Any]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        if isinstance(self._items[index], Exception):
            raise self._items[index]
        return self._items[index]


class Streamed(IterableDataset[Any]):
    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __iter__(self) -> Any:
        return (self._rows[index] for index in range(len(self._rows)))


def source(dataset: Any, workers: int = 0, **options: Any) -> Source:
    steps = options.pop("steps", [])
    augmentation = Augmentation(steps, seed=0, mean=(0.5,), std=(0.25,))
    size = len(dataset._rows) if isinstance(dataset, IterableDataset) else None
    return Source(dataset, augmentation, torch.device("cpu"), False, workers, 0, size=size, **options)


def batches(dataset: Any, rows: int = 4, workers: int = 0, **options: Any) -> list[Batch]:
    return list(EvaluationLoader(source(dataset, workers, **options), rows, 1, 0))


def refusal(dataset: Any, rows: int, workers: int = 0, **options: Any) -> DataError:
    """Returns the error of reading the dataset, without the frames, which would keep its workers alive."""
    try:
        batches(dataset, rows, workers, **options)
    except DataError as error:
        return error.with_traceback(None)
    raise AssertionError("it was read without an error")


@pytest.mark.parametrize("workers", [0, 1])
def test_leaves_keep_their_kind_and_their_rows(workers: int) -> None:
    first, *_ = batches(Texts(6), workers=workers)
    assert first.inputs["ids"].dtype == torch.int64 and first.inputs["mask"].dtype == torch.bool
    assert torch.equal(first.inputs["ids"][2], Texts(6)[2][0]["ids"]) and first.targets.dtype == torch.int64
    values, place = batches(Pairs(6), workers=workers)[0].inputs
    assert values.dtype == torch.float32 and place.dtype == torch.int64 and place.tolist() == [0, 1, 2, 3]


def test_mappings_and_lists_become_plain_dicts_and_tuples() -> None:
    item = UserDict(ids=[torch.arange(3), 2.5]), {"box": torch.zeros(2), "label": True}
    (batch,) = batches(Given([item] * 2))
    assert isinstance(batch.inputs, dict) and isinstance(batch.inputs["ids"], tuple)
    assert batch.inputs["ids"][1].tolist() == [2.5, 2.5] and batch.targets["label"].tolist() == [1, 1]


def test_a_key_may_come_in_another_order() -> None:
    items = [({"a": torch.tensor(1), "b": torch.tensor(2)}, 0), ({"b": torch.tensor(4), "a": torch.tensor(3)}, 1)]
    (batch,) = batches(Given(items))
    assert batch.inputs["a"].tolist() == [1, 3] and batch.inputs["b"].tolist() == [2, 4]


X = torch.zeros(3)


@pytest.mark.parametrize("kind", ["map", "stream"])
@pytest.mark.parametrize(
    ("others", "said", "hint"),
    [
        (
            {7: {"x": X, "mask": torch.ones(4)}},
            "items 0 and 7 of NAME are not alike: their inputs.mask have",
            "collate",
        ),
        ({7: {"x": X, "mask": torch.ones(3).long()}}, "their inputs.mask have dtypes float32 and int64", "one dtype"),
        ({7: {"x": X}}, "their inputs are a tree of x, mask and a tree of x", "the same inputs"),
        ({7: X}, "their inputs are a tree of x, mask and a tensor", "the same inputs"),
        ({7: {"x": X, "mask": None}}, "inputs.mask of item 7 of NAME is None, not a tensor", "Splits.collate"),
        ({7: {"x": X, "mask": "no"}}, "inputs.mask of item 7 of NAME is a str, not a tensor", "Splits.collate"),
        ({7: {"x": X, "mask": [1, 2]}}, "inputs.mask of item 7 of NAME is a list of 2", "torch.tensor("),
        ({7: {"x": X, "mask": {}}}, "inputs.mask of item 7 of NAME is an empty dict", "leave it out"),
        ({7: {"x": X, 3: X}}, "the inputs of item 7 of NAME have the key 3", "arguments"),
        ({7: {"x": {"a": X}, "x.a": X}}, "two leaves of the input of item 7 of NAME are named x.a", "dot"),
        (
            {7: {"x": X, "mask": X.to(torch.complex64)}},
            "inputs.mask of item 7 of NAME is a tensor of complex",
            "view_as_real",
        ),
        ({7: {"x": X, "mask": X.to_sparse()}}, "inputs.mask of item 7 of NAME is a tensor of another", "to_dense()"),
        ({7: {"x": X, "mask": X.to("meta")}}, "inputs.mask of item 7 of NAME is a tensor on the device meta", "CPU"),
    ],
)
def test_a_wrong_leaf_is_named_with_its_item(others: dict[int, Any], said: str, hint: str, kind: str) -> None:
    good = {"x": X, "mask": torch.ones(3)}
    rows: Any = Given([(others.get(index, good), 0) for index in range(9)])
    dataset = rows if kind == "map" else Streamed(rows)
    error = refusal(dataset, 9)
    assert said.replace("NAME", type(dataset).__name__) in error.message, error.message
    assert hint in error.hint


def test_batches_that_are_not_alike_are_named_by_their_leaf() -> None:
    items = [({"x": torch.zeros(2 + (index > 3))}, 0) for index in range(8)]
    with pytest.raises(DataError, match=r"items 0 and 4 of Given .* their inputs.x have shapes \[2\] and \[3\]"):
        batches(Given(items))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_collate_pads_to_the_longest_of_its_batch(workers: int) -> None:
    vary = {"ids": {1: "words"}, "mask": {1: "words"}}
    found = batches(Texts(20, ragged=True), 3, workers, collate=padded, dynamic=vary)
    lengths = [batch.inputs["ids"].shape[1] for batch in found]
    assert len(set(lengths)) > 1 and sum(len(batch.ids) for batch in found) == 20
    for batch in found:
        assert batch.inputs["ids"].dtype == torch.int64 and batch.inputs["mask"].any(0).all()
    assert torch.equal(found[0].targets, batches(Texts(20), 3)[0].targets)
    streamed = batches(Streamed(Texts(20, ragged=True)), 3, collate=padded, dynamic=vary)
    assert all(torch.equal(one.inputs["ids"], two.inputs["ids"]) for one, two in zip(found, streamed, strict=True))
    error = refusal(Texts(20, ragged=True), 3, collate=padded)
    assert "their inputs.ids have shapes" in error.message and 'dynamic={"ids": {1: "length"}}' in error.hint


def test_a_collate_draws_the_same_numbers_for_the_same_rows() -> None:
    def drawing(items: list[Any]) -> tuple[Any, Any]:
        return torch.rand(len(items), 2), torch.zeros(len(items), dtype=torch.int64)

    one, two = (batches(Texts(9, ragged=True), 3, workers, collate=drawing) for workers in (0, 2))
    assert all(torch.equal(left.inputs, right.inputs) for left, right in zip(one, two, strict=True))
    assert not torch.equal(one[0].inputs, one[1].inputs)
    trained = source(Texts(9, ragged=True), collate=drawing).batches(iter([torch.arange(3).numpy()]), 1)
    assert not torch.equal(next(trained).inputs, one[0].inputs), "an epoch draws its own"


@pytest.mark.parametrize(
    ("collate", "said"),
    [
        (lambda items: torch.zeros(len(items)), "items 0, 1, 2 ... of Texts is a Tensor, not a pair"),
        (lambda items: ({"x": torch.zeros(2)}, torch.zeros(len(items))), r"inputs.x of the collated batch .* \[2\]"),
        (lambda items: ({"x": items}, torch.zeros(len(items))), "inputs.x.* of the collated batch"),
        (lambda items: 1 // 0, "collate, of items 0, 1, 2 ... of Texts: ZeroDivisionError"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_wrong_collate_is_named(collate: Any, said: str, workers: int) -> None:
    assert re.search(said, refusal(Texts(8), 4, workers, collate=collate).message)


def test_images_of_a_tree_are_normalized_and_augmented_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (6, 1, 4, 4), generator=generator, dtype=torch.uint8)
    rows = Given([({"left": image, "right": image, "size": index}, 0) for index, image in enumerate(pixels)])

    @dataclass
    class Flip:
        name: str = "random_horizontal_flip"
        p: float = 0.5

    (plain,) = batches(rows, 6)
    torch.testing.assert_close(plain.inputs["left"], (pixels / 255 - 0.5) / 0.25)
    trained = next(source(rows, steps=[Flip()]).batches(iter([torch.arange(6).numpy()]), 0))
    assert torch.equal(trained.inputs["left"], trained.inputs["right"])
    assert not torch.equal(trained.inputs["left"], plain.inputs["left"]) and trained.inputs["size"].tolist()[-1] == 5


def loader(dataset: Any, world_size: int, rank: int, micro: int | None = None, joint: int | None = None) -> TrainLoader:
    sampler = ElasticDistributedSampler(
        range(len(dataset)), world_size, rank, seed=3, global_batch_size=8, micro_batch_size=joint
    )
    return TrainLoader(source(dataset, skip_corrupt=True), sampler, micro)


@pytest.mark.parametrize(("micro", "joint"), [(None, None), (3, None), (None, 2)])
def test_shares_and_micro_batches_are_cut_by_tree(micro: int | None, joint: int | None) -> None:
    data = Texts(21, damaged=(3, 4, 11))
    ids = []
    for rank in range(3):
        for step in loader(data, 3, rank, micro, joint).epoch(0, 0, 3):
            ids += step.ids
            rows = [row for each in step.micro_batches for row in each.inputs["ids"][: each.rows].tolist()]
            assert rows == [data[index][0]["ids"].tolist() for index in step.ids]
            for each in step.micro_batches:
                assert trees.rows_of(each.inputs) >= 2 and len(each.targets) == each.rows
                assert len(each.inputs["mask"]) == len(each.inputs["ids"])
    assert sorted(ids) == [index for index in range(21) if index not in (3, 4, 11)]


def test_a_share_without_decoded_rows_has_copies_of_the_first_items() -> None:
    order = ElasticDistributedSampler(range(21), 1, 0, seed=3, global_batch_size=8).global_batch(0).tolist()
    data = Texts(21, damaged=tuple(order))
    (micro,) = next(iter(loader(data, 1, 0).epoch(0, 0, 1))).micro_batches
    kept = next(index for index in range(21) if index not in order)
    assert micro.rows == 0 and torch.equal(micro.inputs["ids"][0], data[kept][0]["ids"])


def test_statistics_and_compiled_steps_take_trees() -> None:
    found = list(EstimationLoader(source(Texts(21)), 10, 4, 0, 1, 0))
    assert [len(batch.inputs["ids"]) for batch in found] == [3, 3, 4]
    passes = loader(Texts(21), 2, 0, micro=3).full_passes({"ids": torch.zeros(2, 5), "mask": torch.ones(2, 5)})
    assert [trees.shapes_of(each) for each in passes] == [(("ids", (2, 5)), ("mask", (2, 5)))]


def test_the_example_is_real_rows_repeated_where_there_are_few() -> None:
    splits = Splits(Texts(3, damaged=(0,)), Texts(3), 3)
    state = torch.get_rng_state()
    example = splits.example(5)
    assert [row.tolist() for row in example["ids"]] == [Texts(3)[1 + row % 2][0]["ids"].tolist() for row in range(5)]
    example["ids"].zero_()
    assert splits.example(5)["ids"].any(), "it is a copy"
    assert torch.equal(torch.get_rng_state(), state)
    images = ImageArrays(torch.full((1, 1, 2, 2), 255, dtype=torch.uint8), torch.tensor([0]))
    shown = Splits(images, images, 2, mean=(0.5,), std=(0.25,)).example(2)
    assert shown.shape == (2, 1, 2, 2) and torch.allclose(shown, torch.full_like(shown, 2.0))
    stream = Splits(Streamed(Texts(6)), Texts(3), 3, steps_per_epoch=1)
    assert torch.equal(stream.example(2)["ids"][1], Texts(6)[1][0]["ids"])
    nothing = Given([CorruptSampleError("no")] * 3)
    with pytest.raises(DataError, match="none of the first items of Given can be decoded"):
        Splits(nothing, nothing, 2).example(2)


def test_the_description_tells_the_leaves_their_shapes_and_what_varies() -> None:
    vary = {"ids": {1: "words"}, "mask": {1: "words"}}
    found = describe_data(Splits(Texts(9, ragged=True), Texts(9, ragged=True), 3, collate=padded, dynamic=vary))
    assert found["inputs"] == [
        {"name": "ids", "shape": [None, None], "dtype": "int64"},
        {"name": "mask", "shape": [None, None], "dtype": "bool"},
    ]
    assert found["structure"] == "dict" and found["input_shape"] is None
    assert found["dynamic"] == {"ids": {"1": "words"}, "mask": {"1": "words"}}
    pair = describe_data(Splits(Pairs(4), Pairs(4), 3))
    assert pair["structure"] == "tuple" and [each["name"] for each in pair["inputs"]] == ["0", "1"]
    assert pair["inputs"][0]["shape"] == [None, 4] and Splits(Pairs(4), Pairs(4), 3).in_channels == 1
    nested = {"a": X, "b": (X, {"c": X})}
    assert trees.structure_of(nested) == {"a": "tensor", "b": ["tensor", "dict"]}
    images = ImageArrays(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]))
    known = describe_data(Splits(images, images, 2, mean=(0.5,) * 3, std=(0.5,) * 3))
    assert known["input_shape"] == [3, 4, 4] and known["structure"] == "tensor"
    assert known["inputs"] == [{"name": "", "shape": [None, 3, 4, 4], "dtype": "float32"}]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dynamic": {"ids": "words"}}, "Splits.dynamic is {'ids': 'words'}"),
        ({"dynamic": {"ids": {0: "batch"}}}, "besides the batch"),
        ({"collate": 3}, "Splits.collate is a int, not a function"),
    ],
)
def test_a_wrong_collate_or_dynamic_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        Splits(Texts(4), Texts(4), 3, **given)
    assert said in caught.value.message


def test_dynamic_names_leaves_that_are_there() -> None:
    for vary, said in (
        ({"idx": {1: "n"}}, "the leaf 'idx', and the inputs have 'ids', 'mask'"),
        ({"ids": {2: "n"}}, "2"),
    ):
        with pytest.raises(DataError, match=said):
            Splits(Texts(4), Texts(4), 3, dynamic=vary).example(2)
    arrays = ImageArrays(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]))
    with pytest.raises(DataError, match="Splits.train is ImageArrays"):
        Splits(arrays, arrays, 2, mean=(0.5,), std=(0.5,), collate=padded)


def test_content_is_that_of_all_leaves() -> None:
    content = read_content(Texts(5), 0)
    assert not content.differing(read_content(Texts(5), 0)) and not is_random(Texts(5), [0, 1])
    assert f"ids int64 [{LENGTH}] hash" in content.items[0].shown
    rows = [({"ids": torch.arange(4), "x": torch.zeros(3)}, 0) for _ in range(3)]
    changed = [rows[0], ({"ids": torch.tensor([0, 1, 2, 4]), "x": torch.zeros(3)}, 0), rows[2]]
    assert read_content(Given(rows), 0).differing(read_content(Given(changed), 0)) == [1]
    ragged = read_content(Texts(5, ragged=True), 0, padded)
    assert "ids int64" in ragged.items[0].shown and not ragged.differing(read_content(Texts(5, ragged=True), 0, padded))
