"""Items of both splits are compared before training: shapes, dtypes and targets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from dist_train.config.tree import Config
from dist_train.data.arrays import ImageArrays
from dist_train.data.splits import Splits
from dist_train.data.text import DYNAMIC, ByteLines, PadToLongest
from dist_train.distributed.world import World
from dist_train.errors import ConfigError, DataError, ModelError
from dist_train.models.text import text_transformer
from dist_train.pipeline.check_fit import check_fit
from dist_train.tasks import Classification, Task
from dist_train.tasks.regression import Regression
from dist_train.tasks.segmentation import Segmentation

FLOATS, BYTES = torch.zeros(3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)


class Rows(Dataset[Any]):
    """Seven items, all alike, but for those of other places."""

    def __init__(self, input: torch.Tensor, target: Any = 0, others: dict[int, Any] | None = None) -> None:
        self._item, self._others = (input, target), others or {}

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> Any:
        return self._others.get(index, self._item)


class Stream(IterableDataset[Any]):
    input_shape = (3, 8, 8)

    def __init__(self, input: torch.Tensor, target: Any = 0) -> None:
        self._item = input, target

    def __iter__(self) -> Any:
        yield self._item


class Empty(Stream):
    def __iter__(self) -> Any:
        return iter(())


class Pooled(nn.Module):
    """Takes images of any size: nothing but a comparison finds two of them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().mean((2, 3))[:, :2]


def check(
    train: Any, evaluation: Any, task: Any = None, model: nn.Module | None = None, config: Config | None = None
) -> None:
    steps = 5 if isinstance(train, IterableDataset) else None
    splits = Splits(train, evaluation, 2, mean=(0.5,) * 3, std=(0.25,) * 3, steps_per_epoch=steps)
    check_fit(config or Config(), model or Pooled(), splits, task or Classification(2, {}), World())


def arrays(size: int) -> ImageArrays:
    return ImageArrays(torch.zeros(4, 3, size, size, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))


@pytest.mark.parametrize(
    ("train", "evaluation", "said", "hint"),
    [
        (
            Rows(FLOATS),
            Rows(torch.zeros(3, 6, 6)),
            "item 0 of Splits.train (Rows) and item 0 of Splits.eval (Rows) are not alike: "
            "their inputs have shapes [3, 8, 8] and [3, 6, 6]",
            "Resize((height, width))",
        ),
        (Rows(FLOATS), Rows(BYTES), "their inputs have dtypes float32 and uint8", "one dtype"),
        (Rows(FLOATS), arrays(8), "item 0 of Splits.eval (ImageArrays) are not alike: their inputs have dtypes", "one"),
        (arrays(8), arrays(6), "their inputs have shapes [3, 8, 8] and [3, 6, 6]", "Resize"),
        (Stream(FLOATS), Rows(BYTES), "Splits.train (Stream) and item 0 of Splits.eval (Rows) are not", "one dtype"),
        (Stream(torch.zeros(3, 6, 6)), Rows(FLOATS), "states input_shape (3, 8, 8)", "input_shape = (3, 6, 6)"),
        (Rows(FLOATS), Rows(FLOATS[:1]), "shapes [3, 8, 8] and [1, 8, 8]", 'convert("RGB")'),
        (Rows(FLOATS, others={6: (BYTES, 0)}), Rows(FLOATS), "items 0 and 6 of Rows are not alike", "one dtype"),
        (Rows(FLOATS), Rows(FLOATS, others={3: (FLOATS[:, 1:], 0)}), "items 0 and 3 of Rows are not alike", "Resize"),
        (Rows(FLOATS), Rows(FLOATS, 0.5), "item 0 of Rows: classification takes targets int64 [N]", "int(target)"),
        (Rows(FLOATS), Rows(FLOATS, others={6: (FLOATS, 2)}), "item 6 of Rows: targets must lie in range(2)", "num_"),
        (Empty(FLOATS), Rows(FLOATS), "the stream of Empty has no items", "__iter__"),
        (Stream(FLOATS, 2), Rows(FLOATS), "item 0 of Stream: targets must lie in range(2), got 2..2", "num_classes"),
    ],
)
def test_items_that_are_not_alike_are_refused_before_training(
    train: Any, evaluation: Any, said: str, hint: str
) -> None:
    with pytest.raises(DataError) as caught:
        check(train, evaluation)
    assert said in caught.value.message and hint in caught.value.hint, str(caught.value)


def test_pixels_are_exported_of_uint8_images_alone() -> None:
    wanted = Config.model_validate({"export": {"input": "uint8"}})
    check(arrays(8), arrays(8), config=wanted)
    check(Rows(BYTES), Rows(BYTES), config=wanted)
    with pytest.raises(ConfigError, match=r"export.input: 'uint8' is for data of uint8 images .* Rows gives float32"):
        check(Rows(FLOATS), Rows(FLOATS), config=wanted)
    check(Rows(FLOATS), Rows(FLOATS), config=Config.model_validate({"export": {"input": "uint8"}, "stages": ["train"]}))


@pytest.mark.parametrize(
    ("task", "targets", "said"),
    [
        (Regression(2, {}), (torch.zeros(2), torch.zeros(3)), "regression takes targets float [N, 2]"),
        (Regression(1, {}), (0.5, torch.zeros(1)), "their targets have shapes [] and [1]"),
        (
            Segmentation(2, {}),
            (torch.zeros(8, 8, dtype=torch.long), torch.zeros(6, 6, dtype=torch.long)),
            "their targets have shapes [8, 8] and [6, 6]",
        ),
    ],
)
def test_targets_of_other_shapes_than_those_of_the_training_are_refused(task: Any, targets: Any, said: str) -> None:
    with pytest.raises(DataError) as caught:
        check(Rows(FLOATS, targets[0]), Rows(FLOATS, targets[1]), task, nn.Conv2d(3, 2, 1))
    assert said in caught.value.message


def test_splits_that_are_alike_are_taken() -> None:
    check(Rows(FLOATS), Rows(FLOATS, 1))
    check(Rows(BYTES), arrays(8))
    check(Stream(BYTES), arrays(8))
    check(Rows(FLOATS, 1), Rows(FLOATS, torch.tensor(1, dtype=torch.uint8)))


def test_a_loss_that_takes_only_the_training_targets_is_found() -> None:
    class Strict(Classification):
        def check_targets(self, targets: torch.Tensor) -> None:
            pass

        def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            if targets.is_floating_point():
                raise ValueError("floats")
            return super().loss(outputs, targets)

    with pytest.raises(DataError, match="do not fit: floats"):
        check(Rows(FLOATS), Rows(FLOATS, 1.0), Strict(2, {}))


def test_a_task_without_a_loss_is_told_from_one_whose_operation_has_no_kernel() -> None:
    class Without(Classification):
        loss = Task.loss

    class NoKernel(Classification):
        def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError("no kernel for this dtype")

    with pytest.raises(DataError, match="has neither a loss of each sample nor a summed one"):
        check(Rows(FLOATS), Rows(FLOATS), Without(2, {}))
    with pytest.raises(DataError, match="do not fit: no kernel for this dtype"):
        check(Rows(FLOATS), Rows(FLOATS), NoKernel(2, {}))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mean": 0.5}, "Splits.mean is 0.5, not a number for each channel"),
        ({"mean": (125.3,) * 3}, "a mean lies in 0..1"),
        ({"std": (0.2, 0.0, 0.2)}, "a std above 0"),
        ({"std": (0.2, float("nan"), 0.2)}, "a std above 0"),
        ({"num_classes": 2.5}, "Splits.num_classes is 2.5, not a whole number"),
    ],
)
def test_a_description_that_cannot_be_right_is_refused(given: dict[str, Any], said: str) -> None:
    fields: dict[str, Any] = {"num_classes": 2, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(DataError) as caught:
        Splits(arrays(8), arrays(8), **fields | given)
    assert said in caught.value.message and caught.value.hint


def test_numbers_of_numpy_and_torch_are_plain_ones() -> None:
    made = torch.tensor([0.5, 0.25, 0.5])
    splits: Any = Splits(arrays(8), arrays(8), torch.tensor(2), ["a", "b"], made, made.numpy())  # type: ignore[arg-type]
    assert (splits.num_classes, splits.classes, splits.mean) == (2, ("a", "b"), (0.5, 0.25, 0.5))
    assert {type(each) for each in (splits.num_classes, splits.num_outputs)} == {int}
    assert {type(each) for each in (*splits.mean, *splits.std)} == {float}


@torch.library.custom_op("dist_train_test::halve", mutates_args=())
def halve(x: torch.Tensor) -> torch.Tensor:
    return x / 2


class Halved(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return halve(x)


def test_an_operator_that_no_program_may_hold_is_refused_before_training_unless_nothing_is_exported() -> None:
    model = nn.Sequential(Halved(), Pooled())
    for stages in (["train", "export"], ["train", "qat", "convert"]):
        with pytest.raises(ModelError, match="0 calls dist_train_test::halve, which is no operator of torch's own"):
            check(arrays(8), arrays(8), model=model, config=Config(stages=stages))
    check(arrays(8), arrays(8), model=model, config=Config(stages=["train"]))


class Modeless(Pooled):
    def train(self, mode: bool = True) -> Any:
        super().train(mode)


def test_a_train_of_its_own_that_returns_nothing_is_named() -> None:
    with pytest.raises(ModelError, match=r"train\(\) of Modeless does not return the model") as caught:
        check(arrays(8), arrays(8), model=Modeless())
    assert "return super().train(mode)" in caught.value.hint


def test_boxes_are_made_of_a_detectors_outputs_alone() -> None:
    config = Config.model_validate({"export": {"postprocess": True}})
    with pytest.raises(
        ConfigError, match="export.postprocess: makes boxes of a detector's outputs, and the task class"
    ):
        check(Rows(FLOATS), Rows(FLOATS), config=config)
    check(Rows(FLOATS), Rows(FLOATS), config=config.model_copy(update={"stages": ["train"]}))


def test_a_scripted_or_traced_model_is_refused_in_words() -> None:
    inner = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    for model in (torch.jit.script(inner), torch.jit.trace(inner, torch.zeros(2, 3, 8, 8))):
        with pytest.raises(ModelError, match="TorchScript") as caught:
            check(arrays(8), arrays(8), model=model)
        assert "torch.jit.script" in caught.value.hint


@pytest.mark.parametrize(("text", "args"), [("x" * 9, {"max_length": 8}), ("\u00e9", {"vocabulary": 150})])
def test_a_model_is_tried_on_the_longest_text_of_the_largest_tokens(text: str, args: dict[str, int]) -> None:
    # The text is neither the first, nor the middle one, nor the last, which are tried anyway.
    lines = ByteLines(["a", "b", "c", text, "d"], [0, 1, 0, 1, 0], 16)
    splits = Splits(lines, lines, 2, collate=PadToLongest(), dynamic=DYNAMIC)
    config = Config.model_validate({"model": {"name": "text_transformer", "args": args}})
    with pytest.raises(DataError, match="cannot take input_ids .* with numbers up to 256") as caught:
        check_fit(
            config, text_transformer(2, width=8, heads=2, depth=1, **args), splits, Classification(2, {}), World()
        )
    assert "position 8" in caught.value.hint or "token 150" in caught.value.hint
    fits = {"max_length": 16, "vocabulary": 257}
    check_fit(config, text_transformer(2, width=8, heads=2, depth=1, **fits), splits, Classification(2, {}), World())


class Queue(Rows):
    def longest(self) -> int:
        return 7


class Line(Rows):
    def longest(self) -> torch.Tensor:
        return torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("kind", "said"),
    [(Queue, "longest of Queue returns no inputs"), (Line, "returns a tensor of int64, .* a tensor of float32")],
)
def test_a_method_longest_of_another_meaning_is_named(kind: type[Rows], said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        check(kind(FLOATS), Rows(FLOATS))
    assert "another name" in caught.value.hint
