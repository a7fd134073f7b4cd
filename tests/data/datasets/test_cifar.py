"""CIFAR-10 and CIFAR-100: the binary and the Python version of the files give the same, and no other pickle is read."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torchvision

from dist_train import registry
from dist_train.config.data import DataConfig
from dist_train.data.arrays import ImageArrays
from dist_train.data.datasets.cifar import cifar10, cifar100
from dist_train.data.splits import Splits
from dist_train.errors import DataError

NAMES = {"cifar10": [f"kind {n}" for n in range(10)], "cifar100": [f"kind_{n}" for n in range(100)]}
Rows = tuple[np.ndarray, list[int]]


def content(name: str) -> dict[str, Rows]:
    generator = np.random.default_rng(0)
    parts = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"] if name == "cifar10" else ["train", "test"]
    count = len(NAMES[name])
    return {
        part: (generator.integers(0, 256, (4, 3072), dtype=np.uint8), generator.integers(0, count, 4).tolist())
        for part in parts
    }


def write_binary(root: Path, name: str) -> None:
    folder = root / ("cifar-10-batches-bin" if name == "cifar10" else "cifar-100-binary")
    folder.mkdir(parents=True)
    for part, (pixels, labels) in content(name).items():
        columns = [np.array(labels, np.uint8)[:, None], pixels]
        coarse = [np.zeros((len(labels), 1), np.uint8)] if name == "cifar100" else []
        (folder / f"{part}.bin").write_bytes(np.concatenate([*coarse, *columns], axis=1).tobytes())
    meta = "batches.meta.txt" if name == "cifar10" else "fine_label_names.txt"
    (folder / meta).write_text("\n".join(each.replace(" ", "_") for each in NAMES[name]) + "\n")


def write_python(root: Path, name: str) -> Path:
    folder = root / ("cifar-10-batches-py" if name == "cifar10" else "cifar-100-python")
    folder.mkdir(parents=True)
    label, key, meta = (
        ("labels", "label_names", "batches.meta") if name == "cifar10" else ("fine_labels", "fine_label_names", "meta")
    )
    for part, (pixels, labels) in content(name).items():
        (folder / part).write_bytes(pickle.dumps({"data": pixels, label: labels, "filenames": ["x"] * 4}, protocol=2))
    (folder / meta).write_bytes(pickle.dumps({key: NAMES[name]}, protocol=2))
    return folder


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Takes the files that lie in a folder for the published ones: their hashes go into torchvision's tables."""

    def publish(folder: Path, name: str) -> None:
        reader = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]

        def listed(parts: list[Any]) -> list[list[str]]:
            return [[part, hashlib.md5((folder / part).read_bytes()).hexdigest()] for part, _ in parts]

        monkeypatch.setattr(reader, "train_list", listed(reader.train_list))
        monkeypatch.setattr(reader, "test_list", listed(reader.test_list))
        (meta,) = listed([[reader.meta["filename"], ""]])
        monkeypatch.setitem(reader.meta, "md5", meta[1])

    return publish


def opened(name: str, root: Path) -> Splits:
    return {"cifar10": cifar10, "cifar100": cifar100}[name](DataConfig(name=name, root=root))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("version", ["binary", "python", "python, the folder itself"])
def test_both_versions_give_the_images_with_their_classes(
    tmp_path: Path, name: str, version: str, published: Any
) -> None:
    root = tmp_path
    if version == "binary":
        write_binary(tmp_path, name)
    else:
        published(folder := write_python(tmp_path, name), name)
        root = folder if version.endswith("itself") else tmp_path
    splits, parts = opened(name, root), content(name)
    assert registry.datasets.get(name) is {"cifar10": cifar10, "cifar100": cifar100}[name]
    assert splits.input_shape == (3, 32, 32)
    assert [each.replace(" ", "_") for each in splits.classes] == [each.replace(" ", "_") for each in NAMES[name]]
    for split, chosen in ((splits.train, list(parts)[:-1]), (splits.eval, list(parts)[-1:])):
        assert isinstance(split, ImageArrays)
        assert np.array_equal(split.images.flatten(1).numpy(), np.concatenate([parts[part][0] for part in chosen]))
        assert split.targets.tolist() == [label for part in chosen for label in parts[part][1]]


def test_a_pickle_that_is_not_the_published_one_is_refused_and_runs_no_code(tmp_path: Path, published: Any) -> None:
    folder = write_python(tmp_path, "cifar10")
    published(folder, "cifar10")

    class Attack:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    for name in ("data_batch_2", "batches.meta"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(pickle.dumps({"data": Attack()}, protocol=2))
        with pytest.raises(DataError, match=rf"{name} is damaged, or not the published file: its MD5 is") as caught:
            opened("cifar10", tmp_path)
        assert "cifar-10-python.tar.gz" in caught.value.hint
        (folder / name).write_bytes(whole)
    assert not (tmp_path / "ran").exists()
    assert len(opened("cifar10", tmp_path).classes) == 10


def test_damaged_and_missing_files_are_named(tmp_path: Path, published: Any) -> None:
    folder = write_python(tmp_path / "python", "cifar10")
    published(folder, "cifar10")
    path = folder / "data_batch_3"
    whole = path.read_bytes()
    for damaged in (whole[:-200], b"", bytes([whole[0] ^ 1]) + whole[1:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="data_batch_3"):
            opened("cifar10", tmp_path / "python")
    path.unlink()
    with pytest.raises(DataError, match="data_batch_3 cannot be read"):
        opened("cifar10", tmp_path / "python")
    write_binary(tmp_path / "binary", "cifar100")
    path = tmp_path / "binary" / "cifar-100-binary" / "train.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="not a multiple of 3074"):
        opened("cifar100", tmp_path / "binary")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds neither cifar-10-batches-bin") as caught:
        opened("cifar10", tmp_path / "empty")
    assert "--data.root" in caught.value.hint


def test_a_download_goes_to_the_cache_and_its_failure_says_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: Any
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", unreachable)
    data = DataConfig(name="cifar10", cache_dir=tmp_path)
    with pytest.raises(DataError, match="no route to host") as caught:
        cifar10(data)
    assert "--data.root" in caught.value.hint
    published(write_python(tmp_path / "downloads", "cifar10"), "cifar10")
    assert len(cifar10(data).classes) == 10, "what was downloaded is not downloaded again"
