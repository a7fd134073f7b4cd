"""Runs on packed images end with the bytes of undisturbed ones, and keep to what they began with."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest

from dist_train.config.data import DataConfig
from dist_train.config.tree import Config
from dist_train.data.datasets.image_folder import image_folder
from dist_train.data.open_splits import open_splits
from dist_train.distributed.world import World
from dist_train.errors import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, DataError
from dist_train.run_dir.files import read_json
from dist_train.stages.data import RunData
from tests.support.image_files import photo, write_folder
from tests.support.ranks import train_done
from tests.support.small_runs import Runs


class Case:
    """Runs on an image folder of 24 and 9 pictures."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = write_folder(folder / "images")
        self.runs = Runs(folder)

    def options(self, pack: int | str) -> tuple[str, ...]:
        data = ("--data.name", "image_folder", "--data.root", str(self.root), "--data.workers", "0")
        crops = ("--data.augment", "[{name: random_resized_crop}, {name: random_horizontal_flip}]")
        sizes = ("--data.args", f"{{size: 8, resize: 12, pack: {pack}}}", "--data.global_batch_size", "6")
        model = ("--model.args", "{hidden: 4, size: 8}", "--train.epochs", "2", "--checkpoint.every_steps", "2")
        return (*data, *crops, *sizes, *model)

    def __call__(self, name: str, pack: int | str, at: int | None = None) -> int:
        return self.runs(name, *self.options(pack), "--task.name", "interruptible", interrupt_at=at)

    def packs(self) -> list[Path]:
        return sorted((self.folder / "cache" / "packs").glob("*/index.safetensors"))


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def test_a_run_packs_at_its_start_and_resumes_exactly_though_the_pack_was_removed(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    assert case("whole", 12) == EXIT_DONE
    assert len(case.packs()) == 2
    assert "pack of train: 24 images (12 pixels, raw)" in capsys.readouterr().out
    assert case("run", 12, at=5) == -1
    shutil.rmtree(case.folder / "cache")
    assert case("run", 12) == EXIT_DONE
    assert case.runs.product("run") == case.runs.product("whole")
    assert read_json(case.folder / "run" / "environment.json")["pack"] == 12


@pytest.mark.slow
def test_a_run_on_files_does_not_take_up_a_pack_that_was_written_since(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    assert case("files", "off") == EXIT_DONE
    assert case("run", "auto", at=5) == -1
    assert case("packed", 12) == EXIT_DONE
    assert case.runs.product("packed") != case.runs.product("files"), "crops of packed images are others"
    assert case("run", "auto") == EXIT_DONE
    assert case.runs.product("run") == case.runs.product("files")
    capsys.readouterr()
    assert case("auto", "auto") == EXIT_DONE, "a new run does"
    assert case.runs.product("auto") == case.runs.product("packed")
    assert "pack of train: 24 images (12 pixels, raw)" in capsys.readouterr().out


@pytest.mark.slow
def test_another_pack_is_refused_at_a_resume(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    assert case("run", "off", at=5) == -1
    assert case("run", 12) == EXIT_CONFIG
    printed = capsys.readouterr().err
    assert "data.args" in printed and "undo the change to resume it" in printed


def test_where_the_record_is_lost_other_pixels_are_refused(case: Case) -> None:
    assert case("packed", 12) == EXIT_DONE
    data = DataConfig(name="image_folder", root=case.root, cache_dir=case.folder / "cache")
    plain, packed = (
        open_splits(partial(image_folder, data.model_copy(update={"args": args | {"pack": pack}})), Path(), World())
        for args in [{"size": 8, "resize": 12}]
        for pack in ("off", 12)
    )
    for began, now, hint in ((plain, packed, "--data.cache_dir FOLDER"), (packed, plain, "dist-train pack CONFIG")):
        resumed = RunData(config=Config(data=data), world=World(), splits=now)
        with pytest.raises(DataError, match="this run began with images .* and would go on with images") as caught:
            resumed.require_same_data(began.fingerprint)
        assert hint in caught.value.hint


@pytest.mark.slow
def test_a_picture_that_was_changed_is_refused_at_a_resume(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    assert case("run", 12, at=5) == -1
    photo(99, (1, 2, 3)).save(case.root / "train" / "class0" / "003.jpg", quality=91)
    assert case("run", 12) == EXIT_FAILED
    captured = capsys.readouterr()
    assert "packed again, as they were changed: class0/003.jpg" in captured.out
    assert "has changed since this run began" in captured.err


@pytest.mark.slow
def test_two_ranks_share_a_pack_and_consume_what_one_does(case: Case) -> None:
    printed = {}
    for ranks in (1, 2):
        run = ("run", str(case.runs.config), "--run.dir", str(case.folder / f"run{ranks}"), *case.options(12))
        printed[ranks] = train_done(ranks, *run, "--train.optim.name", "sgd", "--train.optim.lr", "0.01")
    assert "; 24 packed now" in printed[1] and "packed now" not in printed[2]
    losses = [
        [line["loss"] for line in case.runs.metrics(f"run{ranks}") if "loss" in line and "lr" in line]
        for ranks in (1, 2)
    ]
    assert losses[0] and losses[0] == pytest.approx(losses[1], rel=1e-4)
