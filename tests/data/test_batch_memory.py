"""Batches without copies: workers fill what they hand over, and large buffers are used again when nobody has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dist_train.config.data import DataConfig, RandomHorizontalFlip, RandomResizedCrop
from dist_train.data.augment.normalize import Normalization
from dist_train.data.batch_memory import Buffers, new_rows
from dist_train.data.datasets.image_folder import image_folder
from dist_train.data.items import Failure
from dist_train.data.stack import Stack
from dist_train.data.workers import EVALUATION, Keyed
from tests.support.image_files import damage, write_folder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("batch", [2, 7])
def test_normalization_in_pieces_has_the_bits_of_one_product_and_one_sum(
    memory_format: torch.memory_format, dtype: torch.dtype, batch: int
) -> None:
    images = torch.randint(0, 256, (batch, 3, 190, 230), dtype=torch.uint8)
    images = images.contiguous(memory_format=memory_format).to(dtype)
    before = images.clone()
    scale = torch.tensor([1.0 / (255.0 * each) for each in STD]).view(-1, 1, 1)
    shift = torch.tensor([-mean / std for mean, std in zip(MEAN, STD, strict=True)]).view(-1, 1, 1)
    found = Normalization(MEAN, STD)(images)
    assert torch.equal(found, images.float().mul(scale).add(shift)) and torch.equal(images, before)
    assert found.is_contiguous(memory_format=memory_format)
    assert torch.equal(found[1:], Normalization(MEAN, STD)(images[1:].clone())), "alone or in a batch"


def test_a_buffer_is_used_again_only_when_nobody_has_a_tensor_of_it() -> None:
    buffers = Buffers()
    first = buffers.take(1000)
    place, view = first.data_ptr(), first[10:20].view(2, 5)
    del first
    other = buffers.take(1000)
    assert other.data_ptr() != place, "a view of it is alive"
    del view
    again = buffers.take(900)
    assert again.data_ptr() == place and len(again) == 900
    assert buffers.take(900).data_ptr() not in (place, other.data_ptr())


def test_two_batches_that_are_alive_do_not_share_memory() -> None:
    normalize = Normalization(MEAN, STD)
    batches = [torch.full((4, 3, 200, 200), value, dtype=torch.uint8) for value in (0, 9, 200)]
    kept = [normalize(batch)[1:] for batch in batches]
    assert all(torch.equal(one, Normalization(MEAN, STD)(batch)[1:]) for one, batch in zip(kept, batches, strict=True))


@pytest.mark.parametrize("channels_last", [False, True])
def test_items_are_made_where_they_are_handed_over(tmp_path: Path, channels_last: bool) -> None:
    write_folder(tmp_path, train=3, val=1, classes=2)
    config = DataConfig(name="image_folder", root=tmp_path, augment=[RandomResizedCrop(), RandomHorizontalFlip()])
    split = image_folder(config.model_copy(update={"args": {"size": 32, "resize": 40, "pack": "off"}})).train
    for epoch in (EVALUATION, 0):
        items = Keyed(split, 3, channels_last).__getitems__([(epoch, index) for index in range(6)])
        batch, failures = Stack("files")(items)
        assert not failures and not isinstance(items[0], Failure) and items[0].batch is batch.inputs
        assert batch.inputs.is_contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )
        single = [Keyed(split, 3)[epoch, index] for index in range(6)]
        assert all(
            not isinstance(each, Failure) and torch.equal(each.input, row)
            for each, row in zip(single, batch.inputs, strict=True)
        )


def test_rows_of_items_that_cannot_be_decoded_are_left_out(tmp_path: Path) -> None:
    write_folder(tmp_path, train=3, val=1, classes=2)
    damage(tmp_path / "train" / "class0" / "001.jpg")
    args = {"size": 32, "resize": 40, "pack": "off"}
    keyed = Keyed(image_folder(DataConfig(name="image_folder", root=tmp_path, args=args)).train, 3)
    batch, failures = Stack("files")(keyed.__getitems__([(0, index) for index in range(4)]))
    assert batch.missing == (1,) and batch.ids.tolist() == [0, 2, 3] and len(failures) == 1
    whole = keyed[0, 3]
    assert not isinstance(whole, Failure) and torch.equal(batch.inputs[2], whole.input)


def test_new_rows_take_the_memory_format_of_the_model() -> None:
    assert new_rows(2, (3, 4, 5), True).is_contiguous(memory_format=torch.channels_last)
    assert new_rows(2, (3, 4, 5), False).is_contiguous() and new_rows(2, (7,), True).shape == (2, 7)
