"""Packed images: the files' own pixels where nothing is cropped at random, whole or absent after a kill."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from torchvision.transforms import v2

from dist_train.cli import main
from dist_train.config.data import DataConfig, RandomHorizontalFlip, RandomResizedCrop
from dist_train.data.augment.steps import Augmentation
from dist_train.data.datasets import image_packs
from dist_train.data.datasets.image_folder import ImageFiles, image_folder
from dist_train.data.image_file import read_image
from dist_train.data.loader import Source
from dist_train.data.packs import write
from dist_train.data.packs.write import scaled
from dist_train.data.splits import Splits
from dist_train.distributed.world import World
from dist_train.errors import EXIT_CONFIG, EXIT_DONE, ConfigError, CorruptSampleError, DataError
from dist_train.pipeline.packing import settle_pack, settled_pack
from tests.support.image_files import damage, photo, write_folder
from tests.support.torch_settings import own_torch_settings

SIZE, RESIZE = 32, 40
CROP, FLIP = RandomResizedCrop(), RandomHorizontalFlip()


class Folder:
    """An image folder with its own place for packs."""

    def __init__(self, path: Path, train: int = 4) -> None:
        self.root = write_folder(path / "images", train=train, val=2, classes=2)
        for place, picture in enumerate(sorted((self.root / "train").rglob("*.jpg"))):
            photo(place, (90, 90, 200), 60 + place, 97).save(picture, quality=95)
        self.cache = path / "cache"
        self.said: list[str] = []

    def data(self, augment: Any = (), **args: Any) -> DataConfig:
        return DataConfig(
            name="image_folder",
            root=self.root,
            cache_dir=self.cache,
            args={"size": SIZE, "resize": RESIZE, **args},
            augment=list(augment),
        )

    def pack(self, stop: Any = lambda: False, **args: Any) -> bool:
        self.said.clear()
        return image_packs.pack_images(self.data(**args), 2, self.said.append, stop, show=False)

    def open(self, augment: Any = (), **args: Any) -> Splits:
        return image_folder(self.data(augment, **args))

    def picture(self, place: int = 0) -> Path:
        return sorted((self.root / "train").rglob("*.jpg"))[place]

    def pixels(self) -> list[Path]:
        return sorted(self.cache.rglob("pixels.bin"))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "CHUNK", 2)


def files(split: Any) -> ImageFiles:
    assert isinstance(split, ImageFiles)
    return split


def test_without_random_crops_packed_images_are_the_files_images(folder: Folder) -> None:
    plain = folder.open()
    assert files(plain.train).pack is None, "nothing is packed unless it is asked for"
    assert folder.pack()
    packed = folder.open()
    for split in ("train", "eval"):
        one, other = files(getattr(plain, split)), files(getattr(packed, split))
        assert other.pack is not None
        assert all(torch.equal(one[n][0], other[n][0]) and one[n][1] == other[n][1] for n in range(len(one)))
    assert files(folder.open(pack="off").train).pack is None
    assert "pack of train: 8 images (40 pixels, raw)" in folder.said[0] and str(folder.cache) in folder.said[0]


def test_a_random_crop_is_torchvisions_of_the_packed_image(folder: Folder) -> None:
    folder.pack()
    train = files(folder.open([CROP, FLIP]).train)
    transform = v2.Compose([v2.RandomResizedCrop(SIZE, scale=CROP.scale, ratio=CROP.ratio), v2.RandomHorizontalFlip()])
    for index in range(len(train)):
        torch.manual_seed(index)
        expected = transform(scaled(read_image(train.path(index)), RESIZE))
        assert torch.equal(train.augmented(index, seed=index)[0], expected)


@pytest.mark.parametrize("format", ["raw", "jpeg"])
def test_packed_crops_are_a_function_of_seed_epoch_and_file_in_any_worker_and_batch(
    folder: Folder, format: str
) -> None:
    folder.pack(pack=RESIZE, pack_format=format)
    split = files(folder.open([CROP, FLIP], pack=RESIZE, pack_format=format).train)
    nothing = Augmentation([], seed=5, mean=(0.0,) * 3, std=(1.0,) * 3)
    found = []
    for workers, cuts, epoch in ((0, 2, 0), (2, 3, 0), (2, 3, 1)):
        source = Source(split, nothing, torch.device("cpu"), False, workers, 5)
        order = np.random.default_rng(workers).permutation(8)
        batches = list(source.batches(iter(np.array_split(order, cuts)), epoch))
        found.append({int(n): row for batch in batches for n, row in zip(batch.ids, batch.inputs, strict=True)})
    assert all(torch.equal(found[0][number], found[1][number]) for number in range(8))
    assert not any(torch.equal(found[1][number], found[2][number]) for number in range(8))


def test_jpegs_in_a_pack_are_nearly_the_images(folder: Folder) -> None:
    folder.pack(pack=RESIZE, pack_format="jpeg")
    plain, packed = folder.open(pack="off"), folder.open(pack=RESIZE, pack_format="jpeg")
    for index in range(8):
        one, other = files(plain.train)[index][0].float(), files(packed.train)[index][0].float()
        assert 0 < (one - other).abs().mean() < 6
    assert files(packed.train).fingerprint.startswith(f"{files(plain.train).fingerprint}+pack")
    assert files(folder.open().train).pack is None, "a pack of another format is another one"


def test_a_changed_file_is_named_and_packed_again_alone(folder: Folder) -> None:
    folder.pack(pack=RESIZE)
    photo(99, (250, 10, 10), 70, 90).save(folder.picture(3), quality=95)
    folder.picture(5).unlink()
    with pytest.raises(DataError, match=r"changed since: class0/003\.jpg; gone: class1/001\.jpg") as caught:
        folder.open(pack=RESIZE)
    assert "dist-train pack CONFIG" in caught.value.hint
    assert files(folder.open().train).pack is None, "auto reads the files then"
    folder.pack()
    assert "1 packed now" in folder.said[0]
    assert folder.said[1] == "pack of train: packed again, as they were changed: class0/003.jpg"
    packed, plain = folder.open(pack=RESIZE), folder.open(pack="off")
    for index in range(7):
        assert torch.equal(files(packed.train)[index][0], files(plain.train)[index][0])


def test_files_that_cannot_be_decoded_are_told_as_without_a_pack(folder: Folder) -> None:
    damage(folder.picture(1))
    folder.pack()
    assert "pack of train: 1 files cannot be decoded: they are treated as without a pack" in folder.said
    train = files(folder.open([CROP]).train)
    assert train.pack is not None
    for read in (train.__getitem__, lambda index: train.augmented(index, seed=1)):
        with pytest.raises(CorruptSampleError, match=r"train/class0/001\.jpg cannot be decoded"):
            read(1)


@pytest.mark.usefixtures("small_chunks")
def test_a_pack_that_was_stopped_is_no_pack_and_goes_on(folder: Folder) -> None:
    asked = iter([False, False, True])
    assert not folder.pack(stop=lambda: next(asked))
    assert files(folder.open().train).pack is None
    with pytest.raises(DataError, match="there is no pack"):
        folder.open(pack=RESIZE)
    # A kill in the middle of a chunk leaves pixels without a line, or a line without its end.
    with folder.pixels()[0].open("ab") as pixels:
        pixels.write(b"half a chunk")
    with (folder.pixels()[0].parent / "journal.jsonl").open("ab") as journal:
        journal.write(b'{"files": [["class1/0')
    assert folder.pack()
    assert "4 packed now" in folder.said[0]
    packed, plain = files(folder.open(pack=RESIZE).train), files(folder.open(pack="off").train)
    assert all(torch.equal(packed[index][0], plain[index][0]) for index in range(8))


_PACK_SLOWLY = """
import sys, time
from pathlib import Path
from dist_train.data.packs import write
from tests.data.packs.test_packs import Folder
write.CHUNK = 2
folder = Folder.__new__(Folder)
folder.root, folder.cache, folder.said = Path(sys.argv[1]), Path(sys.argv[2]), []
def stop():
    print("chunk", flush=True)
    sys.stdin.readline()
    return False
folder.pack(stop=stop)
"""


def test_a_killed_pack_goes_on_with_its_whole_chunks(folder: Folder) -> None:
    command = [sys.executable, "-c", _PACK_SLOWLY, str(folder.root), str(folder.cache)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        for _ in range(3):  # one chunk is written, and another begun, when the third is asked for
            assert process.stdout.readline() == "chunk\n"
            print(file=process.stdin, flush=True)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    assert files(folder.open().train).pack is None
    folder.pack()
    now = int(folder.said[0].rpartition("; ")[2].split()[0])
    assert now in (2, 4, 6), "the second and the third chunk may be written before the signal comes"
    packed, plain = files(folder.open(pack=RESIZE).train), files(folder.open(pack="off").train)
    assert all(torch.equal(packed[index][0], plain[index][0]) for index in range(8))


def test_a_pack_with_a_damaged_part_is_no_pack(folder: Folder) -> None:
    folder.pack()
    for path in (folder.pixels()[0], folder.pixels()[0].parent / "index.safetensors"):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        assert files(folder.open().train).pack is None
        folder.pack()
        assert files(folder.open().train).pack is not None
        assert torch.equal(files(folder.open().train)[7][0], files(folder.open(pack="off").train)[7][0])


def test_an_index_with_a_column_too_short_is_no_pack(folder: Folder) -> None:
    folder.pack()
    path = folder.pixels()[0].parent / "index.safetensors"
    stored = safetensors.numpy.load(path.read_bytes())
    path.write_bytes(safetensors.numpy.save(stored | {"offsets": stored["offsets"][:-1]}))
    assert files(folder.open().train).pack is None


def test_no_room_is_said_before_anything_is_written(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: _Usage())
    with pytest.raises(
        DataError, match=r"packing 8 images \(40 pixels, raw\) takes about .* 1,000 bytes are free"
    ) as caught:
        folder.pack()
    assert "--data.cache_dir" in caught.value.hint and "pack_format jpeg" in caught.value.hint
    assert folder.pixels() == []


class _Usage:
    free = 1000


def test_a_folder_that_cannot_be_written_is_said(folder: Folder) -> None:
    folder.cache.write_text("a file")
    with pytest.raises(DataError, match="images cannot be packed in") as caught:
        folder.pack()
    assert "--data.cache_dir" in caught.value.hint


def test_a_pack_smaller_than_resize_is_refused(folder: Folder) -> None:
    with pytest.raises(ConfigError, match="must be at least resize"):
        folder.open(pack=RESIZE - 1)


def test_a_run_keeps_to_what_it_began_with(folder: Folder) -> None:
    def settled(pack: Any, recorded: Any, packs: bool = True) -> Any:
        return settled_pack(settle_pack(folder.data(pack=pack), World(), recorded, packs))

    assert settled("auto", None) == "off"
    folder.pack()
    assert settled("auto", None) == RESIZE
    assert settled("auto", "off") == "off", "a pack that was written since is not taken up"
    assert settled(RESIZE, None) == RESIZE and settled("off", None) == "off"
    folder.picture().write_bytes(folder.picture(1).read_bytes())
    assert settled("auto", None) == "off"
    assert settled("auto", RESIZE) == RESIZE, "and packed again"
    assert settled(RESIZE, None, packs=False) == "off", "an evaluation packs nothing"
    assert settled_pack(settle_pack(DataConfig(), World(), None, True)) is None


def test_the_command_packs_what_auto_reads(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"name": "image_folder", "root": folder.root, "cache_dir": folder.cache}
    options |= {"args": f"{{size: {SIZE}, resize: {RESIZE}}}", "augment": "[]"}
    words = [word for key, value in options.items() for word in (f"--data.{key}", str(value))]
    with own_torch_settings():
        assert main(["pack", "quickstart", *words]) == EXIT_DONE
    printed = capsys.readouterr().out
    assert "packing train: 8 of 8 images" in printed and f"in {folder.cache}" in printed
    assert files(folder.open().train).pack is not None
    assert main(["pack", "quickstart"]) == EXIT_CONFIG
    assert "the images of digits cannot be packed" in capsys.readouterr().err
