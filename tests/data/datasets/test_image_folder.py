"""Folders of image files: what is read, how it is cut, and what a person reads when the files do not fit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from dist_train import registry
from dist_train.config.checks.general import contradictions
from dist_train.config.data import (
    DataConfig,
    RandAugment,
    RandomErasing,
    RandomHorizontalFlip,
    RandomResizedCrop,
    SplitConfig,
)
from dist_train.config.tree import Config
from dist_train.data.augment.steps import Augmentation
from dist_train.data.content import OfFiles
from dist_train.data.datasets.image_folder import ImageFiles, image_folder
from dist_train.data.division import divided
from dist_train.data.loader import Source
from dist_train.data.part import Part
from dist_train.data.splits import Splits
from dist_train.errors import ConfigError, CorruptSampleError, DataError
from tests.support.image_files import damage, photo, write_folder
from tests.support.ranks import train, train_done

SIZE, RESIZE = 32, 40
CROP, FLIP, RAND = RandomResizedCrop(), RandomHorizontalFlip(), RandAugment()


def opened(root: Path, augment: list[Any] | None = None, **more: Any) -> Splits:
    args = {"size": SIZE, "resize": RESIZE}
    return image_folder(DataConfig(name="image_folder", root=root, args=args, augment=augment or [], **more))


def files(split: Any) -> ImageFiles:
    assert isinstance(split, ImageFiles)
    return split


def test_items_are_the_files_in_order_with_the_shorter_edge_scaled_and_the_centre_cut_out(tmp_path: Path) -> None:
    splits = opened(write_folder(tmp_path, train=3, val=2))
    assert registry.datasets.get("image_folder") is image_folder
    assert splits.classes == ("class0", "class1", "class2") and splits.num_classes == 3 and splits.resize == RESIZE
    assert splits.input_shape == (3, SIZE, SIZE)
    train_files, reference = files(splits.train), v2.Compose([v2.Resize(RESIZE), v2.CenterCrop(SIZE)])
    assert (len(train_files), len(files(splits.eval))) == (9, 6)
    for index in range(9):
        path = tmp_path / "train" / f"class{index // 3}" / f"{index % 3:03d}.jpg"
        assert train_files.path(index) == path
        image, target = train_files[index]
        assert torch.equal(image, reference(decode_image(str(path)))) and image.dtype == torch.uint8
        assert target == index // 3
        assert torch.equal(image, train_files.augmented(index, seed=1)[0]), "no augmentation unless it is asked for"


def batches(split: Any, workers: int, epochs: list[int], augment: list[Any], seed: int = 5) -> list[dict[int, Any]]:
    """For each epoch: file -> its pixels."""
    steps = augment[files(split).own_steps :]
    made = Augmentation(steps, seed=seed, mean=(0.0,) * 3, std=(1.0,) * 3)
    source = Source(split, made, torch.device("cpu"), False, workers, seed)
    found = []
    for epoch in epochs:
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(epoch + workers)).numpy()
        fetched = source.batches(iter(np.array_split(order, 2 + workers)), epoch)
        found.append({int(n): row for batch in fetched for n, row in zip(batch.ids, batch.inputs, strict=True)})
    return found


def test_augmentation_is_a_function_of_seed_epoch_and_file_in_any_worker_and_batch(tmp_path: Path) -> None:
    augment = [CROP, FLIP, RAND, RandomErasing(p=0.5)]
    splits = opened(write_folder(tmp_path, train=4, val=1, classes=2), augment)
    assert files(splits.train).own_steps == 3, "erasing is made of batches"
    alone = batches(splits.train, 0, [0, 1], augment)
    working = batches(splits.train, 2, [0, 1, 0], augment)
    for left, right in ((alone[0], working[0]), (alone[1], working[1]), (alone[0], working[2])):
        assert sorted(left) == list(range(8)) and all(torch.equal(left[number], right[number]) for number in left)
    assert not any(torch.equal(alone[0][number], alone[1][number]) for number in range(8))
    other = batches(splits.train, 0, [0], augment, seed=6)[0]
    assert not any(torch.equal(alone[0][number], other[number]) for number in range(8))
    plain = [files(splits.train)[number][0] for number in range(8)]
    evaluated = Source(
        splits.train, Augmentation([], seed=0, mean=(0.0,) * 3, std=(1.0,) * 3), torch.device("cpu"), False, 0, 0
    )
    (batch,) = evaluated.batches(iter([np.arange(8)]), None)
    assert torch.allclose(batch.inputs * 255, torch.stack(plain).float(), atol=1e-3), "calibration is not augmented"


def test_the_random_crop_is_torchvisions(tmp_path: Path) -> None:
    splits = opened(write_folder(tmp_path, train=1, val=1, classes=2), [CROP])
    image, _ = files(splits.train).augmented(1, seed=77)
    torch.manual_seed(77)
    whole = decode_image(str(tmp_path / "train" / "class1" / "000.jpg"), mode=ImageReadMode.RGB)
    assert torch.equal(image, v2.RandomResizedCrop(SIZE, scale=CROP.scale, ratio=CROP.ratio)(whole))


def test_a_corrupt_file_is_named(tmp_path: Path) -> None:
    train_files = files(opened(write_folder(tmp_path, train=2, val=1, classes=2)).train)
    damage(train_files.path(1))
    for read in (train_files.__getitem__, lambda index: train_files.augmented(index, seed=1)):
        with pytest.raises(CorruptSampleError, match=r"train/class0/001\.jpg cannot be decoded"):
            read(1)


def test_phones_pictures_are_trained_on_and_evaluated_upright(tmp_path: Path) -> None:
    write_folder(tmp_path, train=1, val=1, classes=2)
    image, exif = photo(1, (200, 100, 50), 60, 60), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "val" / "class0" / "000.jpg", quality=95)
    image.save(tmp_path / "train" / "class0" / "000.jpg", quality=95, exif=exif)
    splits = opened(tmp_path)
    upright = v2.CenterCrop(SIZE)(v2.Resize(RESIZE)(decode_image(str(files(splits.train).path(0))).rot90(-1, (1, 2))))
    assert torch.equal(files(splits.train)[0][0], upright)
    assert torch.equal(files(splits.train).augmented(0, seed=1)[0], upright)
    assert not torch.equal(files(splits.eval)[0][0], upright)


def test_a_split_makes_the_evaluation_set_of_one_folder_of_classes(tmp_path: Path) -> None:
    write_folder(tmp_path, train=6, val=2)
    split = SplitConfig(eval=0.5, by="class")
    both = opened(tmp_path, split=split)
    assert (len(files(both.train)), len(files(both.eval))) == (18, 6), "val/ stays what it is"
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(DataError, match="has no folder val") as caught:
        opened(tmp_path)
    assert "--data.split.eval 0.1 makes the evaluation set" in caught.value.hint
    for root in (tmp_path, tmp_path / "train"):
        splits = opened(root, split=split)
        assert splits.eval is None and splits.classes == ("class0", "class1", "class2")
        parts = divided(splits, split)
        assert isinstance(parts.train, Part) and isinstance(parts.eval, Part) and isinstance(parts.eval, OfFiles)
        assert sorted([*parts.train.rows, *parts.eval.rows]) == list(range(18))
        assert np.bincount(files(splits.train).targets[parts.eval.rows]).tolist() == [3, 3, 3]
        assert parts.eval.path(0) == files(splits.train).path(int(parts.eval.rows[0]))
        augmented = batches_of_part(parts.train, [])
        assert set(augmented) == set(parts.train.rows.tolist())


def batches_of_part(part: Part, augment: list[Any]) -> dict[int, torch.Tensor]:
    """Id -> pixels of a part's items, by two workers."""
    made = Augmentation(augment[part.own_steps :], seed=0, mean=(0.0,) * 3, std=(1.0,) * 3)  # type: ignore[attr-defined]
    source = Source(part, made, torch.device("cpu"), False, 2, 0)
    fetched = source.batches(iter(np.array_split(np.arange(len(part)), 3)), 0)
    return {int(n): row for batch in fetched for n, row in zip(batch.ids, batch.inputs, strict=True)}


def test_the_fingerprint_follows_names_and_sizes(tmp_path: Path) -> None:
    write_folder(tmp_path, train=2, val=1, classes=2)
    first = files(opened(tmp_path).train).fingerprint
    assert files(opened(tmp_path).train).fingerprint == first != files(opened(tmp_path).eval).fingerprint
    path = tmp_path / "train" / "class0" / "000.jpg"
    path.rename(path.with_name("zero.jpg"))
    renamed = files(opened(tmp_path).train).fingerprint
    damage(tmp_path / "train" / "class1" / "000.jpg")
    assert len({first, renamed, files(opened(tmp_path).train).fingerprint}) == 3


def _empty_a_class(root: Path) -> None:
    (root / "train" / "class1" / "000.jpg").rename(root / "train" / "class1" / "000.tiff")


def _other_class(root: Path) -> None:
    (root / "val" / "class1").rename(root / "val" / "cat")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "val").rename(root / "test"), "has no folder val: it holds test, train"),
        (lambda root: shutil.rmtree(root / "train" / "class1"), "two or more classes; it holds class0"),
        (_empty_a_class, r"1 classes without an image, such as class1; other files: 1 of \.tiff"),
        (_other_class, "only in train: class1; only in val: cat"),
        (lambda root: (root / "val" / "class0" / "x.bmp").touch(), r"no images: 1 of \.bmp"),
    ],
)
def test_folders_that_do_not_fit_are_said(tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    write_folder(tmp_path, train=1, val=1, classes=2)
    (tmp_path / "train" / "class0" / ".DS_Store").touch()  # hidden files are nobody's fault
    opened(tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        opened(tmp_path)
    assert caught.value.hint


@pytest.mark.parametrize("target", ["../../../nowhere/1a2b.png", "annexed.png"])
def test_links_that_lead_nowhere_are_named_or_left_out(tmp_path: Path, target: str) -> None:
    write_folder(tmp_path, train=1, val=1, classes=2)
    (tmp_path / "train" / "class0" / "annexed.png").symlink_to(target)
    with pytest.raises(DataError, match=r"1 links in .*train lead nowhere, such as .*class0/annexed\.png") as caught:
        opened(tmp_path)
    assert "--data.on_corrupt skip" in caught.value.hint
    train_files = files(opened(tmp_path, on_corrupt="skip").train)
    assert [train_files.path(n).name for n in range(len(train_files))] == ["000.jpg", "annexed.png", "000.jpg"]
    with pytest.raises(CorruptSampleError, match="is a link that leads nowhere"):
        train_files[1]


@pytest.mark.parametrize("place", ["train/class2", "val/class0/more"])
def test_a_folder_s_link_that_leads_nowhere_is_never_left_out(tmp_path: Path, place: str) -> None:
    write_folder(tmp_path, train=1, val=1, classes=2)
    (tmp_path / place).symlink_to("nowhere")
    with pytest.raises(DataError, match=rf"lead nowhere, such as .*{place}"):
        opened(tmp_path, on_corrupt="skip")


@pytest.mark.parametrize("target", [".", "..", "../..", "../class1", "../../val/class0/../.."])
def test_links_to_folders_that_are_read_anyway_do_not_multiply_images(tmp_path: Path, target: str) -> None:
    write_folder(tmp_path, train=2, val=1, classes=2)
    (tmp_path / "train" / "class0" / "again").symlink_to(target)
    train_files = files(opened(tmp_path).train)
    assert [train_files.path(n).parent.name for n in range(len(train_files))] == 2 * ["class0"] + 2 * ["class1"]


def test_a_class_that_is_a_link_to_another_class_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, train=1, val=1, classes=2)
    for split in ("train", "val"):
        (tmp_path / split / "class2").symlink_to("class1")
    with pytest.raises(DataError, match=r"train/class2 is a link to .*class1, whose images are found without it"):
        opened(tmp_path)


def test_links_to_folders_elsewhere_are_followed_once(tmp_path: Path) -> None:
    write_folder(tmp_path / "pool", train=2, val=1, classes=2)
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        (tmp_path / "data" / split / "a").symlink_to(tmp_path / "pool" / split / "class0")
        (tmp_path / "data" / split / ".store").mkdir()
        (tmp_path / "pool" / split / "class1").rename(tmp_path / "data" / split / ".store" / "1")
        (tmp_path / "data" / split / "b").symlink_to(".store/1")
    # Two folders elsewhere that lead to each other.
    for name, other in (("one", "two"), ("two", "one")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "round").symlink_to(tmp_path / other)
        photo(1, (9, 9, 9)).save(tmp_path / name / f"{name}.png")
    (tmp_path / "data" / "train" / "a" / "more").symlink_to(tmp_path / "one")
    train_files = files(opened(tmp_path / "data").train)
    names = [train_files.path(n).name for n in range(len(train_files))]
    assert names == ["000.jpg", "001.jpg", "one.png", "two.png", "000.jpg", "001.jpg"]


def test_names_that_are_no_utf8_are_read_and_said_escaped(tmp_path: Path) -> None:
    write_folder(tmp_path, train=1, val=1, classes=2)
    latin = os.fsdecode(b"caf\xe9")
    for split in ("train", "val"):
        (tmp_path / split / "class0").rename(tmp_path / split / latin)
    path = tmp_path / "train" / latin / os.fsdecode(b"\xe9t\xe9.jpg")
    (tmp_path / "train" / latin / "000.jpg").rename(path)
    splits = opened(tmp_path)
    assert splits.classes == (r"caf\xe9", "class1")
    assert files(splits.train).path(0) == path and files(splits.train)[0][1] == 0
    damage(path)
    with pytest.raises(CorruptSampleError) as caught:
        files(splits.train)[0]
    assert r"train/caf\xe9/\xe9t\xe9.jpg cannot be decoded" in str(caught.value)
    str(caught.value).encode()


def test_arguments_are_checked() -> None:
    with pytest.raises(ConfigError, match="--data.root"):
        image_folder(DataConfig(name="image_folder"))
    with pytest.raises(ConfigError, match="must be at least size"):
        image_folder(DataConfig(name="image_folder", args={"size": 300}))


@pytest.mark.parametrize(
    ("name", "augment", "message"),
    [
        ("digits", [CROP], "is applied by the workers of image_folder, and not for digits"),
        ("image_folder", [RandomErasing(), RAND], "rand_augment comes behind random_erasing"),
        ("image_folder", [FLIP, CROP], "can only be the first entry"),
        ("digits", [RandomErasing(scale=(0.5, 0.1))], "the least, 0.5, is above the most, 0.1"),
    ],
)
def test_augmentation_that_cannot_be_made_is_a_mistake_of_the_configuration(
    name: str, augment: list[Any], message: str
) -> None:
    config = Config(data=DataConfig(name=name, augment=augment))
    (problem,) = [each for each in contradictions(config, {}) if each.place.startswith("data.augment")]
    assert message in problem.message and problem.hint
    fine = Config(data=DataConfig(name="image_folder", augment=[CROP, FLIP, RAND, RandomErasing()]))
    assert not [each for each in contradictions(fine, {}) if each.place.startswith("data.augment")]


def _options(root: Path, run: Path, *more: str) -> list[str]:
    options = {
        "data.name": "image_folder", "data.root": root, "data.global_batch_size": 7, "data.workers": 1,
        "data.args": "{size: 32, resize: 36}", "stages": "[train, ptq, convert]", "run.device": "cpu", "run.dir": run,
        "data.augment": "[{name: random_resized_crop}, {name: random_horizontal_flip}, {name: rand_augment}]",
        "train.epochs": 2, "debug.ledger": "true",
    }  # fmt: skip
    flat = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    return ["run", "configs/quickstart.yaml", *flat, *more]


@pytest.mark.slow
def test_a_folder_trains_on_two_ranks_without_its_corrupt_files_and_says_so(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "images")
    damage(root / "train" / "class1" / "003.jpg")
    damage(root / "val" / "class0" / "001.jpg")
    with train(1, *_options(root, tmp_path / "strict")) as ranks:
        assert ranks.wait() == [1]
        assert "val/class0/001.jpg cannot be decoded" in ranks.output(0) or "003.jpg cannot" in ranks.output(0)
    skip = ["--data.on_corrupt", "skip", "--data.mix.mixup", "0.2", "--data.mix.cutmix", "1.0"]
    printed = train_done(2, *_options(root, tmp_path / "run", *skip))
    assert "epoch 1/2: left out 1 samples that cannot be decoded" in printed
    assert "on 8 samples, without 1 that cannot be decoded" in printed
    assert '"skipped_samples":1' in (tmp_path / "run" / "metrics.jsonl").read_text()
    with train(1, "ledger", str(tmp_path / "run")) as ranks:
        assert ranks.wait() == [0], ranks.printed()
        assert "train epoch 1: 1 samples left out" in ranks.output(0)
        assert "each sample that can be decoded was consumed exactly once an epoch" in ranks.output(0)


class Pids(torch.utils.data.Dataset[Any]):
    """Items that say which process made them."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(1, 2, 2), os.getpid()


def test_workers_outlive_an_epoch() -> None:
    source = Source(Pids(), Augmentation([], seed=0, mean=(0.5,), std=(0.2,)), torch.device("cpu"), False, 2, 0)
    made = [
        {int(pid) for batch in source.batches(iter(np.arange(8).reshape(4, 2)), epoch) for pid in batch.targets}
        for epoch in (0, 1, None)
    ]
    assert made[0] == made[1] == made[2] and len(made[0]) == 2 and os.getpid() not in made[0]
