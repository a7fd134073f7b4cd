"""A run whose newest checkpoint, or another of its files, is damaged goes on from what is whole, and says so."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_train.distributed.world import World
from dist_train.errors import CheckpointError
from dist_train.pipeline.recovery import agree_on_checkpoint
from dist_train.run_dir.files import read_json
from dist_train.run_dir.ledger import check
from dist_train.run_dir.leftovers import beside
from dist_train.run_dir.paths import RunDir
from dist_train.run_dir.saved import manifest_bytes
from tests.support.small_runs import STEPS, Runs, run_here

Damage = Callable[[Path], object]


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def removed(file: Path) -> None:
    file.unlink()


ALL = [flipped, cut, emptied, removed]
TENSORS, TREE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
LEDGER = ["--debug.ledger", "true", "--checkpoint.every_steps", "4"]


def damaged(path: Path, name: str, both: bool = True) -> None:
    """Damages a checkpoint, and its copy if there is one and `both`."""
    for folder in (path / name, path / f"copy-of-{name}"):
        if folder.exists() and (both or folder.name == name):
            flipped(folder / TENSORS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Runs, dict[str, bytes]]:
    """A run that was interrupted after its checkpoints at steps 8, 11, 12 and 16, and the undisturbed one's product."""
    runs = Runs(tmp_path_factory.mktemp("runs"))
    assert runs("whole", *LEDGER, "--task.name", "interruptible") == 0
    assert runs("interrupted", *LEDGER, interrupt_at=18) == -1
    assert runs.checkpoints("interrupted").newest_first()[:2] == ["train-00000016", "train-00000012"]
    return runs, runs.product("whole")


class Case:
    def __init__(self, made: tuple[Runs, dict[str, bytes]], folder: Path) -> None:
        self.runs = Runs(folder)
        self.whole = made[1]
        # The same cache and the same settings, so that the resumed run is the same run.
        self.runs.config.write_text(made[0].config.read_text())
        shutil.copytree(made[0].folder / "interrupted", folder / "run")
        self.dir = RunDir(folder / "run")
        self.path = self.dir.checkpoints

    def resume(self, *options: str) -> int:
        return self.runs("run", *LEDGER, "--task.name", "interruptible", *options)

    def assert_as_undisturbed(self) -> None:
        assert self.runs.product("run") == self.whole
        assert check(self.dir.path).ok, str(check(self.dir.path))
        assert read_json(self.dir.status)["state"] == "done" and read_json(self.dir.status)["restarts"] == 1
        assert {line["attempt"] for line in self.runs.metrics("run")} == {0, 1}


@pytest.fixture
def case(made: tuple[Runs, dict[str, bytes]], tmp_path: Path) -> Case:
    return Case(made, tmp_path)


@pytest.mark.parametrize("damage", ALL, ids=lambda each: each.__name__)
@pytest.mark.parametrize("file", [TENSORS, TREE, MANIFEST])
def test_the_newest_that_verifies_is_gone_on_from(
    file: str, damage: Damage, case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(case.path / "train-00000016" / file)
    agreed = agree_on_checkpoint(case.dir, ["train"], World(), print)
    said = capsys.readouterr().out
    assert agreed == "train-00000012" and case.runs.checkpoints("run").latest == "train-00000012"
    assert f"train-00000016/{file}" in said and "it is kept as damaged-train-00000016" in said
    assert "going on from the checkpoint train-00000012: 4 steps of train are done again" in said
    assert (case.path / "damaged-train-00000016").is_dir() and not (case.path / "train-00000016").exists()
    again = agree_on_checkpoint(case.dir, ["train"], World(), print)
    assert again == "train-00000012" and capsys.readouterr().out == "", "it is not found a second time"


@pytest.mark.parametrize("file", [TENSORS, TREE, MANIFEST])
def test_a_run_that_went_back_ends_like_an_undisturbed_one(
    file: str, case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(case.path / "train-00000016" / file)
    assert case.resume() == 0
    printed = "".join(capsys.readouterr())
    assert "4 steps of train are done again" in printed and "resuming (attempt 1) in train at step 12" in printed
    case.assert_as_undisturbed()
    assert sorted(path.name for path in case.path.iterdir()) == ["damaged-train-00000016", "latest.json", "train-end"]


def test_the_second_newest_may_be_damaged_too(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(case.path / "train-00000016")
    emptied(case.path / "train-00000012" / MANIFEST)
    names = case.runs.checkpoints("run").names()
    assert names == ["train-00000011"], "the best evaluated one is left"
    assert case.resume() == 0
    printed = "".join(capsys.readouterr())
    assert "5 steps of train are done again" in printed and "kept as damaged-train-00000012" in printed
    case.assert_as_undisturbed()


@pytest.mark.parametrize("text", [None, "", '{"name": "../../x"}', '{"name": "/nowhere"}', '{"name": "train-end"}'])
def test_a_latest_that_is_lost_or_wrong_costs_nothing(
    text: str | None, case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    latest = case.path / "latest.json"
    latest.unlink() if text is None else latest.write_text(text)
    assert case.resume() == 0
    printed = "".join(capsys.readouterr())
    assert "resuming (attempt 1) in train at step 16" in printed
    assert "latest.json" in printed or "train-end is incomplete" in printed
    case.assert_as_undisturbed()


def test_where_none_verifies_nothing_is_changed(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    for name in case.runs.checkpoints("run").names():
        flipped(case.path / name / TENSORS)
    before = sorted(path.name for path in case.path.iterdir())
    assert case.resume() == 1
    error = capsys.readouterr().err
    for name in ("train-00000011", "train-00000012", "train-00000016"):
        assert f"{name}/{TENSORS}" in error
    assert "-> restore one from a backup" in error and "--run.dir" in error
    assert sorted(path.name for path in case.path.iterdir()) == before
    assert read_json(case.dir.status)["state"] == "failed"


def test_a_checkpoint_of_another_version_is_not_taken_for_damaged(case: Case) -> None:
    folder = case.path / "train-00000016"
    tree = json.loads((folder / TREE).read_bytes())
    rewritten(folder, {**tree, "format": 99})
    with pytest.raises(CheckpointError, match="format 99"):
        agree_on_checkpoint(case.dir, ["train"], World(), print)
    assert folder.is_dir()


@pytest.mark.parametrize("damage", ALL, ids=lambda each: each.__name__)
@pytest.mark.parametrize("file", ["status.json", "environment.json", "config.yaml"])
def test_a_file_beside_the_checkpoints_is_rebuilt(
    file: str, damage: Damage, case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (case.dir.path / file).read_bytes()
    damage(case.dir.path / file)
    assert case.resume() == 0
    case.assert_as_undisturbed()
    if file == "config.yaml":
        assert (case.dir.path / file).read_bytes() == whole
        assert "config.yaml" in "".join(capsys.readouterr())
        assert (case.dir.path / "damaged-config.yaml").exists() == (damage is not removed)
    elif file == "environment.json":
        assert read_json(case.dir.environment)["threads_per_rank"] == json.loads(whole)["threads_per_rank"]


def test_all_of_them_lost_are_rebuilt(case: Case) -> None:
    for file in (case.dir.status, case.dir.environment, case.dir.config, case.path / "latest.json"):
        file.unlink()
    assert case.resume() == 0
    case.assert_as_undisturbed()


@pytest.mark.parametrize("damage", [flipped, emptied, removed], ids=lambda each: each.__name__)
def test_without_its_config_another_learning_rate_is_refused(
    damage: Damage, case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(case.dir.config)
    assert case.resume("--train.optim.lr", "0.03") == 78
    error = capsys.readouterr().err
    assert "train.optim.lr" in error and "was 0.02, is 0.03" in error


def rewritten(folder: Path, document: dict[str, Any]) -> None:
    """Writes a checkpoint's JSON anew, with the hashes that fit it."""
    (folder / TREE).write_text(json.dumps(document))
    hashes = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in (TENSORS, TREE)}
    (folder / MANIFEST).write_bytes(manifest_bytes(folder.name, hashes))


def without_copies(case: Case) -> None:
    """Makes the checkpoints those of a version that kept no copies of the run's files in them."""
    for name in case.runs.checkpoints("run").names():
        folder = case.path / name
        document = json.loads((folder / TREE).read_bytes())
        for key in ("run", "needs"):
            del document["state"][key]
        del document["state"]["retention"]["needs"]
        rewritten(folder, document)


def test_older_checkpoints_load_and_what_cannot_be_checked_is_said(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    without_copies(case)
    flipped(case.path / "train-00000016" / TENSORS)
    case.dir.config.unlink()
    case.dir.environment.unlink()
    assert case.resume() == 0
    printed = "".join(capsys.readouterr())
    assert "config.yaml is lost, and the checkpoints hold no copy: the settings cannot be compared" in printed
    assert "environment.json is lost, and no checkpoint has a copy" in printed
    case.assert_as_undisturbed()


def test_a_done_run_is_opened_and_done_without_its_files(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    assert case.resume() == 0
    for file in (case.dir.status, case.dir.environment, case.dir.config):
        file.unlink()
    assert run_here("evaluate", str(case.dir.path)) == 0
    assert not case.dir.config.exists(), "evaluate writes nothing"
    results = read_json(case.dir.results)
    emptied(case.dir.results)
    assert case.resume() == 0
    assert read_json(case.dir.status) == {**read_json(case.dir.status), "state": "done", "restarts": 2}
    assert read_json(case.dir.results)["models"] == results["models"]
    capsys.readouterr()
    assert case.resume() == 0 and "this run is done" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("position", [0, -1], ids=["newest", "best"])
def test_what_select_best_needs_is_there_wherever_a_run_goes_back_to(position: int, tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    slow = ["--train.optim.lr", "0.05", "--train.schedule", "{warmup: 0.9}", "--train.epochs", "6"]
    best = ["--train.select", "best", *slow, *LEDGER]
    assert runs("whole", *best, "--task.name", "interruptible") == 0
    assert runs("run", *best, interrupt_at=5 * STEPS + 5) == -1
    names = runs.checkpoints("run").newest_first()
    assert names == ["train-00000060", "train-00000056", "train-00000044"], "the last one is the best"
    damaged(tmp_path / "run" / "checkpoints", names[position], both=False)
    assert runs("run", *best, "--task.name", "interruptible") == 0
    assert runs.product("run") == runs.product("whole")
    assert runs.results("run")["stages"]["train"]["selected"] == runs.results("whole")["stages"]["train"]["selected"]


def interrupted_in_second_stage(tmp_path: Path, steps: int) -> Runs:
    runs = Runs(tmp_path)
    settings = [*LEDGER, *TWO]
    assert runs("whole", *settings, "--task.name", "interruptible") == 0
    assert runs("run", *settings, interrupt_at=3 * STEPS + steps) == -1
    return runs


TWO = ["--stages", "[train, qat]", "--qat.epochs", "2", "--model", "{name: small_resnet, args: {width: 4, blocks: 1}}"]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 8])
def test_a_stages_end_may_be_damaged_while_the_next_stage_runs(
    steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = interrupted_in_second_stage(tmp_path, steps)
    path = tmp_path / "run" / "checkpoints"
    damaged(path, "train-end", both=False)
    assert runs("run", *LEDGER, *TWO, "--task.name", "interruptible") == 0
    printed = "".join(capsys.readouterr())
    assert "kept as damaged-train-end" in printed and "no step is done again" in printed
    for stage in ("train", "qat"):
        assert runs.product("run", stage) == runs.product("whole", stage)
    assert check(tmp_path / "run").ok
    assert sorted(each.name for each in path.iterdir()) == ["damaged-train-end", "latest.json", "qat-end", "train-end"]


@pytest.mark.slow
def test_with_its_copy_too_the_last_checkpoint_before_the_end_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = interrupted_in_second_stage(tmp_path, 2)
    damaged(tmp_path / "run" / "checkpoints", "train-end")
    assert runs("run", *LEDGER, *TWO, "--task.name", "interruptible") == 0
    printed = "".join(capsys.readouterr())
    assert "going on from the checkpoint train-00000032: 1 step of train is done again" in printed
    for stage in ("train", "qat"):
        assert runs.product("run", stage) == runs.product("whole", stage)
    assert check(tmp_path / "run").ok


def test_the_first_checkpoint_of_a_stage_may_be_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = interrupted_in_second_stage(tmp_path, 8)
    damaged(tmp_path / "run" / "checkpoints", "qat-00000004")
    assert runs("run", *LEDGER, *TWO, "--task.name", "interruptible") == 0
    printed = "".join(capsys.readouterr())
    assert "going on from the checkpoint train-end: 4 steps of qat are done again" in printed
    assert runs.product("run", "qat") == runs.product("whole", "qat")


def test_other_runs_start_from_the_newest_that_verifies(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    flipped(case.path / "train-00000016" / TENSORS)
    before = sorted(path.name for path in case.path.iterdir())
    assert case.runs("other", "--model.init_from", str(case.dir.path), "--train.epochs", "1") == 0
    assert "after step 12 of its unfinished stage train" in capsys.readouterr().out
    assert sorted(path.name for path in case.path.iterdir()) == before, "another run's files are not touched"


def test_leftovers_of_killed_writers_go_at_the_next_start(case: Case) -> None:
    dead = ".x.{}.0123abcd.tmp"
    machine = beside(Path("x")).name.split(".")[2].split("-")[0]
    for place in (case.dir.path, case.path, case.dir.ledger):
        (place / dead.format(f"{machine}-4194305-1")).touch()
    (case.path / dead.format(f"{machine}-4194305-2")).mkdir()
    assert case.resume() == 0
    assert not list(case.dir.path.rglob(".*.tmp"))


@pytest.mark.parametrize("name", ["status.json", "STOP", "metrics.jsonl", "checkpoints/latest.json"])
def test_a_folder_in_the_place_of_a_file_is_named(name: str, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    (case.dir.path / name).unlink(missing_ok=True)
    (case.dir.path / name).mkdir()
    assert case.resume() == 78
    error = capsys.readouterr().err
    assert f"{name} is a folder, where a file of the run belongs" in error and "rmdir " in error
    (case.dir.path / name).rmdir()
    assert case.resume() == 0
