"""Errors of other code end a run in words, with the traceback kept in the run directory."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dist_train
from dist_train.console.progress import Progress
from dist_train.run_dir import files
from dist_train.run_dir.files import read_json
from dist_train.tasks import Classification
from tests.support.small_runs import CONFIG, run_here


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Own(BaseException):
    """No Exception: what `except Exception` lets through."""


KINDS: dict[str, Callable[[], BaseException]] = {
    "several lines": lambda: ValueError("first line\nsecond line"),
    "torch": lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    "a key": lambda: KeyError("colour"),
    "a full disk": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "memory": lambda: MemoryError(),
    "exit": lambda: SystemExit(3),
    "exit as if done": lambda: SystemExit(0),
    "an own kind": lambda: Own("first line"),
    "no text": lambda: Unspeakable(),
    "an end": lambda: StopIteration(),
    "a module": lambda: ModuleNotFoundError("No module named 'albumentations'", name="albumentations"),
}
TEXTS = {
    "several lines": "ValueError: first line",
    "torch": "RuntimeError: mat1",
    "a key": "KeyError: 'colour'",
    "a full disk": "make room on that disk",
    "memory": "--data.micro_batch_size",
    "exit": "SystemExit: 3 (",
    "exit as if done": "in place of exit()",
    "an own kind": "Own: first line (",
    "no text": "Unspeakable",
    "an end": "StopIteration",
    "a module": "pip install albumentations",
}
planted: dict[str, Any] = {}


def trip(place: str) -> None:
    """Raises what is planted at `place`, once its count of calls is reached."""
    if planted.get("place") == place:
        planted["calls"] -= 1
        if planted["calls"] < 0:
            raise KINDS[planted["kind"]]()


class Net(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        trip("forward" if self.training else "evaluation")
        y: torch.Tensor = super().forward(x)
        return y


@dist_train.register_model("tripping")
def tripping(num_classes: int) -> nn.Module:
    trip("model")
    return Net(nn.Flatten(), nn.Linear(64, num_classes))


@dist_train.register_task("tripping")
class TrippingTask(Classification):
    def __init__(self, num_outputs: int | None, args: Any) -> None:
        trip("task")
        super().__init__(num_outputs, args)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        trip("loss")
        return super().loss(outputs, targets)


@dist_train.register_stage("tripping")
class TrippingStage(dist_train.Stage):
    def run(self, context: Any) -> dict[str, Any]:
        trip("stage")
        return {}

    def restore(self, context: Any, product: dict[str, Any]) -> None:
        pass


@dist_train.register_tracker("tripping")
class TrippingTracker(dist_train.Tracker):
    def begin(self, config: Any) -> None:
        if planted.get("tracker") == "begins":
            trip("tracker")

    def log(self, stage: str, epoch: int, step: int, scalars: Any) -> None:
        trip("tracker")


def end_of_run(place: str, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, calls: int, *options: str) -> int:
    config = folder / "small.yaml"
    config.write_text(CONFIG)
    for key, value in {"place": place, "kind": kind, "calls": calls}.items():
        monkeypatch.setitem(planted, key, value)
    words = (
        "--model.name",
        "tripping",
        "--model.args",
        "{}",
        "--task.name",
        "tripping",
        "--train.epochs",
        "1",
        "--checkpoint.retry",
        "0",
    )
    stages = "[train, tripping]" if place == "stage" else "[train]"
    return run_here("run", str(config), *words, "--stages", stages, "--run.dir", str(folder / "run"), *options)


def check_words(code: int, text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = capsys.readouterr().err
    assert code == 1, said
    assert text in said and "Traceback" not in said
    kept = said.partition("traceback: ")[2].strip()
    assert "Traceback (most recent call last)" in Path(kept).read_text()
    status = read_json(folder / "run" / "status.json")
    if status is not None:  # the run directory is opened once the arguments are checked
        assert Path(kept) == folder / "run" / "logs" / "failure-0-rank0.txt"
        assert status["state"] == "failed" and "ForeignError" not in status["error"]


@pytest.mark.parametrize("kind", list(KINDS))
def test_each_kind_of_error_is_said_in_words(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = end_of_run("loss", kind, tmp_path, monkeypatch, 4)
    check_words(code, TEXTS[kind], tmp_path, capsys)


@pytest.mark.parametrize(
    ("place", "calls"),
    [("model", 0), ("task", 0), ("forward", 8), ("evaluation", 0), ("stage", 0)],
)
@pytest.mark.parametrize("kind", ["several lines", "exit as if done", "an own kind"])
def test_an_error_names_the_place_that_raised_it(
    place: str,
    calls: int,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = end_of_run(place, kind, tmp_path, monkeypatch, calls)
    said = {"several lines": "ValueError: first line", "exit as if done": "SystemExit: 0", "an own kind": "Own: first"}
    check_words(code, said[kind], tmp_path, capsys)


@pytest.mark.parametrize("kind", ["several lines", "exit as if done", "an own kind"])
@pytest.mark.parametrize("place", ["begins", "logs"])
def test_a_tracker_that_raises_anything_is_left_out(
    place: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(planted, "tracker", place)
    code = end_of_run("tracker", kind, tmp_path, monkeypatch, 0, "--trackers", "[jsonl, tripping]")
    said = capsys.readouterr().out
    assert code == 0 and "is left out: " in said and read_json(tmp_path / "run" / "status.json")["state"] == "done"


@pytest.mark.parametrize("kind", ["several lines", "exit as if done", "an own kind", "a module"])
def test_a_module_that_cannot_be_imported_keeps_its_traceback(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"broken_{list(KINDS).index(kind)}"
    (tmp_path / f"{name}.py").write_text(f"from {__name__} import KINDS\n\nraise KINDS[{kind!r}]()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "small.yaml").write_text(CONFIG)
    assert run_here("run", str(tmp_path / "small.yaml"), "--import", name) == 78
    said = capsys.readouterr().err
    assert f"{name} (--import): cannot be imported: " in said and f"{name}.py:3)" in said and TEXTS[kind] in said
    kept = Path(said.partition("traceback: ")[2].strip()).read_text()
    assert "Traceback (most recent call last)" in kept and "raise KINDS" in kept


def test_a_module_that_is_not_there_needs_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small.yaml").write_text(CONFIG)
    assert run_here("run", str(tmp_path / "small.yaml"), "--import", "not_there_at_all") == 78
    said = capsys.readouterr().err
    assert "give the name of a module in the working directory" in said and "traceback" not in said


@pytest.mark.parametrize("file", ["checkpoint", "results.json", "metrics"])
def test_a_disk_that_takes_nothing_more_is_named(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    if file == "checkpoint":
        monkeypatch.setattr("dist_train.run_dir.checkpoint.write_folder", lambda *_: (_ for _ in ()).throw(full))
    elif file == "metrics":
        monkeypatch.setattr(files.LineFile, "append", lambda *_: (_ for _ in ()).throw(full))
    else:
        write = files.replace_json

        def replace(path: Path, value: Any, **more: Any) -> None:
            if path.name == file:
                raise full
            write(path, value, **more)

        monkeypatch.setattr("dist_train.pipeline.run.replace_json", replace)
    code = end_of_run("nowhere", "a key", tmp_path, monkeypatch, 0)
    said = "".join(capsys.readouterr())
    assert "No space left on device" in said and "Traceback" not in said
    if file == "metrics":
        assert code == 0, "a tracker that fails is left out"
    else:
        assert code == 1 and "  -> " in said


def test_an_error_in_evaluate_keeps_its_traceback_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end_of_run("nowhere", "a key", tmp_path, monkeypatch, 0) == 0
    monkeypatch.setitem(planted, "place", "evaluation")
    assert run_here("evaluate", str(tmp_path / "run")) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"dist-train: KeyError: 'colour' ({__file__}:")
    assert "Traceback (most recent call last)" in Path(said.partition("traceback: ")[2].strip()).read_text()


def test_ctrl_c_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "say", interrupt)
    assert end_of_run("nowhere", "a key", tmp_path, monkeypatch, 0) == 130
    assert capsys.readouterr().err.endswith("dist-train: interrupted\n")
