"""A resume on data that was changed since the run began is refused, and one on a copy of the same data is not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_train.data import content, file_record
from dist_train.errors import EXIT_DONE, EXIT_FAILED
from dist_train.stages.context import Context
from tests.support.image_files import write_folder
from tests.support.small_runs import Runs
from tests.support.unlike_data import ROWS, Changing, Rows

PICTURE = "train/class1/003.jpg"
CHANGED = "has changed since this run began"
TOUCHED = "files of the training data have other times than when this run began"


class Case:
    """A run on an image folder, of 24 and 9 pictures, that was interrupted after a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.root = write_folder(folder / "images")
        self.runs = Runs(folder)
        self.record = folder / "run" / "data-files.safetensors"
        assert self("--checkpoint.every_steps", "2", at=3) == -1

    def __call__(self, *options: str, at: int | None = None) -> int:
        data = ("--data.name", "image_folder", "--data.root", str(self.root), "--data.workers", "0")
        sizes = ("--data.args", "{size: 8, resize: 8}", "--data.global_batch_size", "6")
        model = ("--model.args", "{hidden: 4, size: 8}", "--train.epochs", "2", "--task.name", "interruptible")
        return self.runs("run", *data, *sizes, *model, *options, interrupt_at=at)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def change(path: Path) -> None:
    """Changes a byte of a picture, in its compressed data."""
    data = bytearray(path.read_bytes())
    data[-20] ^= 255
    path.write_bytes(data)


def touch(case: Case) -> None:
    os.utime(case.root / PICTURE)


def copy(case: Case) -> None:
    shutil.copytree(case.root, case.root.with_name("copied"), copy_function=shutil.copyfile)
    shutil.rmtree(case.root)
    case.root.with_name("copied").rename(case.root)


@pytest.mark.parametrize(
    ("happens", "said"),
    [
        (lambda case: None, ""),
        (touch, f"1 {TOUCHED}, and the same names and lengths: their content is the same"),
        (copy, f"24 {TOUCHED}"),
        (lambda case: case.record.unlink(), ""),
        (lambda case: case.record.write_bytes(b"damaged"), ""),
    ],
    ids=["nothing", "touch", "copy", "record lost", "record damaged"],
)
def test_the_same_pictures_resume(
    case: Case, happens: Callable[[Case], None], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    happens(case)
    capsys.readouterr()
    assert case() == EXIT_DONE
    printed = capsys.readouterr().out
    assert said in printed and (bool(said) or "other times" not in printed)
    assert file_record.read_record(case.record) is not None


@pytest.mark.parametrize("old_time", [False, True])
def test_a_changed_picture_of_the_same_length_is_named(
    case: Case, old_time: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(content, "ITEMS", 1)  # so that it is not among the sample
    picture = case.root / PICTURE
    before = picture.stat()
    change(picture)
    if old_time:
        os.utime(picture, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert case() == EXIT_FAILED
    printed = capsys.readouterr().err
    assert f"{CHANGED}: other content of the same length in {picture}" in printed and "restore the same data" in printed


def test_a_changed_picture_in_the_sample_is_found_without_a_record(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    case.record.unlink()
    change(case.root / "train/class0/000.jpg")
    assert case() == EXIT_FAILED
    printed = capsys.readouterr().err
    assert f"{CHANGED}: item 0 of the training data: item 0 was class0/000.jpg of " in printed


def test_in_a_folder_too_large_to_read_the_changed_file_is_named_in_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(file_record, "SECONDS", -1.0)  # one file of each split is read
    monkeypatch.setattr(content, "ITEMS", 1)
    case = Case(tmp_path)
    change(case.root / PICTURE)
    assert case() == EXIT_DONE
    printed = capsys.readouterr().out
    assert f"1 {TOUCHED}" in printed and f"not compared: {case.root / PICTURE}" in printed


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Rows, Rows], int]:
    """Begins a run on rows, interrupts it, and resumes it on other rows."""

    def resume(before: Rows, after: Rows) -> int:
        runs = Runs(tmp_path)
        options = ("--data.name", "changing", "--data.workers", "0", "--model.args", "{hidden: 4, size: 4}")
        options += ("--task.name", "interruptible", "--checkpoint.every_steps", "2")
        monkeypatch.setattr(Changing, "rows", before)
        assert runs("run", *options, interrupt_at=3) == -1
        monkeypatch.setattr(Changing, "rows", after)
        return runs("run", *options)

    return resume


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (Rows(others=range(ROWS)), "items 0, 4, 8 and 13 more items of the training data: item 0 was float32"),
        (Rows(shift=1), "item 0 was float32 [1, 4, 4], target 0 and is float32 [1, 4, 4], target 1"),
        (Rows(ROWS - 1), CHANGED),
    ],
)
def test_other_rows_of_a_map_style_dataset_are_refused(
    interrupted: Callable[[Rows, Rows], int], after: Rows, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert interrupted(Rows(), after) == EXIT_FAILED
    printed = capsys.readouterr().err
    assert f"the dataset changing {CHANGED}" in printed and said in printed, printed


@pytest.mark.parametrize(
    ("rows", "after", "said"),
    [
        (Rows(), Rows(), ""),
        (Rows(noise=1.0), Rows(noise=1.0), "is not the same when it is read twice"),
        (Rows(), Rows(factor=1.00001), "differ by rounding from what this run began with"),
    ],
)
def test_the_same_rows_and_random_ones_resume(
    interrupted: Callable[[Rows, Rows], int],
    rows: Rows,
    after: Rows,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert interrupted(rows, after) == EXIT_DONE
    printed = capsys.readouterr().out
    assert said in printed and (bool(said) or "of the training data" not in printed)


def test_a_checkpoint_of_an_earlier_version_holds_no_content_and_resumes(
    interrupted: Callable[[Rows, Rows], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    described = Context._for_checkpoints

    def without(context: Context) -> dict[str, Any]:
        return {key: value for key, value in described(context).items() if key != "content"}

    monkeypatch.setattr(Context, "_for_checkpoints", without)
    assert interrupted(Rows(), Rows()) == EXIT_DONE
