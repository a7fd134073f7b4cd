"""The built-in datasets: sizes, constants, arguments, and what a person reads when the files are not there."""

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from sklearn.datasets import load_digits

from dist_train import registry
from dist_train.config.data import DataConfig
from dist_train.data.arrays import ImageArrays
from dist_train.data.datasets import mnist as idx_files
from dist_train.data.datasets.args import cache_folder
from dist_train.data.datasets.digits import _read, digits
from dist_train.data.datasets.fake import fake
from dist_train.data.datasets.mnist import fashion_mnist, mnist
from dist_train.data.splits import Splits
from dist_train.errors import ConfigError, DataError
from tests.support.idx_files import idx, write_fashion_mnist


def moments(images: torch.Tensor) -> tuple[list[float], list[float]]:
    pixels = images.double() / 255
    return pixels.mean((0, 2, 3)).tolist(), pixels.std((0, 2, 3), unbiased=False).tolist()


def image_arrays(splits: Splits) -> tuple[ImageArrays, ImageArrays]:
    assert isinstance(splits.train, ImageArrays) and isinstance(splits.eval, ImageArrays)
    return splits.train, splits.eval


def test_registered_names_lead_here() -> None:
    for name, function in (("digits", digits), ("fashion_mnist", fashion_mnist), ("fake", fake)):
        assert registry.datasets.get(name) is function


def test_digits_are_split_by_class_and_always_alike() -> None:
    splits = digits(DataConfig(name="digits"))
    train, evaluation = image_arrays(splits)
    assert (len(train), len(evaluation)) == (1437, 360)
    assert splits.input_shape == (1, 8, 8) and splits.num_classes == 10 and splits.classes == tuple("0123456789")
    assert int(train.images.max()) == 255 and int(train.images.min()) == 0
    shares = torch.bincount(evaluation.targets) / torch.bincount(torch.cat([train.targets, evaluation.targets]))
    assert float((shares - 0.2).abs().max()) < 0.01
    digest = hashlib.sha256(evaluation.images.numpy().tobytes() + evaluation.targets.numpy().tobytes()).hexdigest()
    assert digest[:16] == "9d36e8a72aee3b6d", "another split makes results incomparable"
    everything = torch.cat([train.images, evaluation.images])
    assert len(everything.unique(dim=0)) == 1797, "no image is in both"


@pytest.mark.parametrize("found", [True, False])
def test_digits_are_those_of_sklearn_wherever_it_keeps_them(found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not found:
        monkeypatch.setattr(Path, "is_file", lambda path: False)
    pixels, classes = _read()
    theirs = load_digits()
    assert pixels.dtype == theirs.images.dtype and (pixels == theirs.images).all()
    assert classes.dtype == np.int64 and (classes == theirs.target).all()


def test_digits_constants_are_those_of_the_training_split() -> None:
    splits = digits(DataConfig(name="digits"))
    mean, std = moments(image_arrays(splits)[0].images)
    assert splits.mean == pytest.approx(mean, abs=5e-5) and splits.std == pytest.approx(std, abs=5e-5)


@pytest.mark.skipif(not idx_files._DEBIAN_FASHION_MNIST.is_dir(), reason="apt-get install dataset-fashion-mnist")
def test_fashion_mnist_of_debian() -> None:
    splits = fashion_mnist(DataConfig(name="fashion_mnist"))
    train, evaluation = image_arrays(splits)
    assert (len(train), len(evaluation)) == (60_000, 10_000) and splits.input_shape == (1, 28, 28)
    assert torch.bincount(train.targets).tolist() == [6000] * 10
    mean, std = moments(train.images)
    assert splits.mean == pytest.approx(mean, abs=5e-5) and splits.std == pytest.approx(std, abs=5e-5)
    assert splits.classes[9] == "Ankle boot" and int(train.targets[0]) == 9


@pytest.mark.parametrize(("below", "zipped"), [(".", True), (".", False), ("FashionMNIST/raw", False)])
def test_fashion_mnist_is_read_from_root(tmp_path: Path, below: str, zipped: bool) -> None:
    content = write_fashion_mnist(tmp_path / below, zipped)
    train, evaluation = image_arrays(fashion_mnist(DataConfig(name="fashion_mnist", root=tmp_path)))
    for split, prefix in ((train, "train"), (evaluation, "t10k")):
        assert np.array_equal(split.images[:, 0].numpy(), content[f"{prefix}-images-idx3-ubyte"])
        assert np.array_equal(split.targets.numpy(), content[f"{prefix}-labels-idx1-ubyte"])
        assert split.ids.tolist() == list(range(len(split)))


@pytest.mark.parametrize("below", [".", "MNIST/raw"])
def test_mnist_is_read_from_root(tmp_path: Path, below: str) -> None:
    content = write_fashion_mnist(tmp_path / below)
    splits = mnist(DataConfig(name="mnist", root=tmp_path))
    assert registry.datasets.get("mnist") is mnist and splits.classes == tuple("0123456789")
    train, evaluation = image_arrays(splits)
    assert np.array_equal(train.images[:, 0].numpy(), content["train-images-idx3-ubyte"])
    assert evaluation.targets.tolist() == content["t10k-labels-idx1-ubyte"].tolist()


def _cut(content: bytes) -> bytes:
    return content[:-20]


def _flip_a_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 64]) + content[middle + 1 :]


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"])
@pytest.mark.parametrize(
    "damage",
    [
        _cut,
        _flip_a_bit,
        lambda _: b"",
        lambda _: b"<html>not found</html>",
        lambda content: gzip.compress(gzip.decompress(content)[:-1]),
        lambda content: gzip.compress(gzip.decompress(content) + b"x"),
        lambda content: gzip.compress(b"\0\0\x0d" + gzip.decompress(content)[3:]),
        lambda content: gzip.compress(b"\0\0"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: Any) -> None:
    write_fashion_mnist(tmp_path)
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=name.removesuffix(".gz")) as caught:
        fashion_mnist(DataConfig(name="fashion_mnist", root=tmp_path))
    assert caught.value.hint == "fetch the file again"


def test_a_missing_file_and_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx(np.zeros(11))))
    with pytest.raises(DataError, match="12 train images, but 11 labels"):
        fashion_mnist(DataConfig(name="fashion_mnist", root=tmp_path))
    labels.unlink()
    with pytest.raises(DataError, match="train-labels-idx1-ubyte.gz") as caught:
        fashion_mnist(DataConfig(name="fashion_mnist", root=tmp_path))
    assert "--data.root" in caught.value.hint
    labels.write_bytes(gzip.compress(idx(np.full(12, 10))))
    with pytest.raises(DataError, match=r"range\(10\)"):
        fashion_mnist(DataConfig(name="fashion_mnist", root=tmp_path))


def test_a_download_goes_to_the_cache_and_its_failure_says_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idx_files, "_DEBIAN_FASHION_MNIST", tmp_path / "absent")
    data = DataConfig(name="fashion_mnist", cache_dir=tmp_path)

    def unreachable(*_: Any, **__: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", unreachable)
    with pytest.raises(DataError, match="no route to host") as caught:
        fashion_mnist(data)
    assert "--data.root" in caught.value.hint
    write_fashion_mnist(tmp_path / "downloads" / "FashionMNIST" / "raw", zipped=False)
    assert len(image_arrays(fashion_mnist(data))[0]) == 12, "what was downloaded is not downloaded again"


def test_the_cache_folder_follows_the_config_then_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder(DataConfig(cache_dir=tmp_path)) == tmp_path
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(DataConfig()) == tmp_path / "xdg" / "dist_train"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(DataConfig()) == tmp_path / ".cache" / "dist_train"


@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare makes the user without a name")
def test_a_user_without_a_name_or_home_is_told_what_to_give(tmp_path: Path) -> None:
    program = (
        "from dist_train.config.data import DataConfig; from dist_train.data.datasets.args import cache_folder\n"
        "from dist_train.errors import SetupError; from dist_train.trackers.wandb import possible_mode\n"
        "from dist_train.doctor import disk; from dist_train.doctor.base import Subject\n"
        "assert possible_mode() == 'offline'\n"
        f"assert 'cache_dir' in list(disk.check(Subject({str(tmp_path)!r})))[-1].hint\n"
        "try: cache_folder(DataConfig())\n"
        "except SetupError as error: print(error)\n"
    )
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[3])}
    words = ["unshare", "--user", "--map-user=54321", "--map-group=54321"]
    if subprocess.run([*words, "true"], capture_output=True, timeout=60).returncode != 0:
        pytest.skip("no right to make a user namespace")
    done = subprocess.run(
        [*words, sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=120
    )
    assert "user 54321 has no home folder" in done.stdout and "--data.cache_dir FOLDER" in done.stdout, done.stderr


def test_fake_images_are_deterministic_and_of_the_sizes_asked_for() -> None:
    args = {"num_train": 50, "num_eval": 30, "num_classes": 4, "channels": 2, "height": 9, "width": 7, "seed": 3}
    splits = fake(DataConfig(name="fake", args=args))
    train, evaluation = image_arrays(splits)
    assert splits.input_shape == (2, 9, 7) and (len(train), len(evaluation)) == (50, 30)
    assert len(splits.classes) == 4 and torch.bincount(train.targets).tolist() == [13, 13, 12, 12]
    again = image_arrays(fake(DataConfig(name="fake", args=args)))[0]
    other = image_arrays(fake(DataConfig(name="fake", args=args | {"seed": 4})))[0]
    assert torch.equal(again.images, train.images) and not torch.equal(other.images, train.images)
    assert not torch.equal(train.images[:30], evaluation.images)


def test_fake_images_can_be_learned_and_are_normalized_by_their_constants() -> None:
    splits = fake(DataConfig(name="fake", args={"num_train": 400, "num_classes": 10}))
    train, evaluation = image_arrays(splits)
    # The nearest class mean is right about images that were never seen.
    centres = torch.stack([train.images[train.targets == label].float().mean(0) for label in range(10)])
    predicted = torch.cdist(evaluation.images.float().flatten(1), centres.flatten(1)).argmin(1)
    assert float((predicted == evaluation.targets).float().mean()) > 0.95
    mean, std = moments(train.images)
    assert splits.mean == pytest.approx(mean, abs=0.05) and splits.std == pytest.approx(std, abs=0.03)


@pytest.mark.parametrize("kind", ["multilabel", "regression", "segmentation"])
def test_fake_images_have_targets_of_other_tasks(kind: str) -> None:
    args = {"kind": kind, "num_train": 40, "num_eval": 10, "num_classes": 3, "channels": 2, "height": 9, "width": 7}
    splits, again = (fake(DataConfig(name="fake", args=args)) for _ in range(2))
    targets = image_arrays(splits)[0].targets
    assert splits.num_outputs == 3 and splits.input_shape == (2, 9, 7)
    assert torch.equal(targets, image_arrays(again)[0].targets)
    if kind == "segmentation":
        assert targets.shape == (40, 9, 7) and targets.unique().tolist() == [0, 1, 2, 255]
        assert (targets[:, 0] == 255).all() and (targets[:, 1:-1, 1:-1] != 255).all()
    else:
        assert targets.shape == (40, 3) and targets.dtype == torch.float32
        assert splits.num_classes == (3 if kind == "multilabel" else 0)
        assert targets.unique().tolist() == [0, 1] if kind == "multilabel" else float(targets.min()) < 0


def test_wrong_arguments_are_all_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        fake(DataConfig(name="fake", args={"num_train": 0, "hight": 8}))
    assert sorted(problem.place for problem in caught.value.problems) == ["data.args.hight", "data.args.num_train"]
    assert "height" in str(caught.value)
    for name, function in (("digits", digits), ("fashion_mnist", fashion_mnist)):
        with pytest.raises(ConfigError, match=r"data\.args\.seed"):
            function(DataConfig(name=name, args={"seed": 1}))
