"""Runs that draw rows by weight, or make their evaluation set of training rows: what they say, prove and refuse."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

import dist_train
from dist_train.config.data import DataConfig
from dist_train.errors import EXIT_CONFIG, EXIT_FAILED
from dist_train.finished_run.ledger import check_ledger
from dist_train.run_dir.ledger import read_steps
from dist_train.run_dir.paths import RunDir
from tests.support.small_runs import STEPS, Runs, run_here

BALANCED = ["--data.sampling.weights", "class_balanced", "--debug.ledger", "true"]
UNEVEN = ["--data.name", "uneven", "--data.args", "{}", "--data.workers", "0", "--train.epochs", "2"]
CLASSES = np.repeat([0, 1, 2, 3, 4, 5], [100, 60, 30, 8, 4, 1])


class Uneven(Dataset[Any]):
    """203 images of six classes, of uneven sizes; `groups` are of seven rows each."""

    def __init__(self) -> None:
        self.targets = CLASSES.tolist()
        self.groups = (np.arange(len(CLASSES)) // 7).tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((1, 8, 8), index / 203) + 0.1 * torch.rand(1, 8, 8), self.targets[index]


@dist_train.register_dataset("uneven")
def uneven(data: DataConfig) -> dist_train.Splits:
    return dist_train.Splits(Uneven(), Uneven() if data.split is None else None, num_classes=6)


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def _ids(runs: Runs, name: str, stage: str = "train", epoch: int = 0) -> list[int]:
    return [
        number
        for (of, _), lines in sorted(read_steps(runs.folder / name).items())
        for line in lines
        if of == stage and line["epoch"] == epoch
        for number in line["ids"]
    ]


@pytest.mark.heavy
def test_balanced_classes_come_equally_often_and_the_ledger_proves_the_draw(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs("a", *BALANCED, *UNEVEN, "--data.sampling.samples", "600") == 0
    first, second = (_ids(runs, "a", epoch=epoch) for epoch in (0, 1))
    assert len(first) == len(second) == 600 and Counter(first) != Counter(second)
    assert all(70 < times < 130 for times in Counter(CLASSES[first]).values())
    assert runs.results("a")["stages"]["train"]["steps"] == 60
    capsys.readouterr()
    assert run_here("ledger", str(runs.folder / "a")) == 0
    assert "each step consumed exactly the samples that were drawn for it by weight" in capsys.readouterr().out


@pytest.mark.heavy
def test_a_ledger_with_another_sample_than_was_drawn_says_which_step(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs("a", *BALANCED) == 0
    file = RunDir(runs.folder / "a").ledger_of(0)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[4]["ids"][3] = other = (lines[4]["ids"][3] + 1) % 203
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    capsys.readouterr()
    assert run_here("ledger", str(runs.folder / "a")) == EXIT_FAILED
    said = capsys.readouterr().out
    assert f"train step 4: it consumed 1 that were not drawn, such as [{other}], and not 1 that were" in said
    np.save(RunDir(runs.folder / "a").ledger / "weights.npy", np.ones(203))
    assert run_here("ledger", str(runs.folder / "a")) == EXIT_CONFIG
    assert "weights.npy is damaged: its content is another" in capsys.readouterr().err


@pytest.mark.heavy
def test_without_replacement_an_epoch_has_each_row_at_most_once(runs: Runs) -> None:
    np.save(runs.folder / "w.npy", np.arange(203))
    given = ["--data.sampling", f"{{weights: {runs.folder / 'w.npy'}, replacement: false, samples: 50}}"]
    assert runs("a", *given, "--debug.ledger", "true") == 0
    ids = _ids(runs, "a")
    assert len(set(ids)) == len(ids) == 50 and 0 not in ids and np.mean(ids) > 110
    assert check_ledger(runs.folder / "a").ok


@pytest.mark.heavy
def test_a_run_is_not_resumed_with_other_weights(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    file = runs.folder / "w.txt"
    file.write_text("1\n" * 203)
    given = ["--data.sampling.weights", str(file), "--debug.ledger", "true"]
    assert runs("whole", *given, "--task.name", "interruptible") == 0
    assert runs("a", *given, interrupt_at=STEPS + 3) == -1
    file.write_text("1\n" * 202 + "2\n")
    assert runs("a", *given, "--task.name", "interruptible") == EXIT_FAILED
    assert "the weights of data.sampling have changed since this run began" in capsys.readouterr().err
    file.write_text("1\n" * 203)
    assert runs("a", *given, "--task.name", "interruptible") == 0
    assert runs.product("a") == runs.product("whole") and check_ledger(runs.folder / "a").ok
    assert _ids(runs, "a") == _ids(runs, "whole")


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (["--data.sampling.weights", "./none.npy"], EXIT_CONFIG, "the file none.npy does not exist"),
        (["--data.sampling.weights", "./none.pt"], EXIT_CONFIG, "none.pt is no .npy, .csv or .txt file"),
        (["--data.sampling", "{}"], EXIT_CONFIG, "data.sampling.weights"),
        (["--data.sampling.weights", "importance"], EXIT_FAILED, "ImageArrays has no attribute or method importance"),
        (["--data.split", "{}"], EXIT_CONFIG, "needs a share to evaluate on, or a number of folds"),
        (["--data.split", "{eval: 0.1, folds: 3}"], EXIT_CONFIG, "(--data.split): has both"),
        (["--data.split", "{folds: 3, fold: 3}"], EXIT_CONFIG, "there is no fold 3 of 3"),
        (["--data.split", "{eval: 0.1, by: group}"], EXIT_FAILED, "ImageArrays has no attribute `groups`"),
    ],
)
def test_mistakes_end_with_what_to_type(
    given: list[str], code: int, said: str, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs("a", *given) == code
    assert said in capsys.readouterr().err


@pytest.mark.heavy
def test_folds_are_runs_that_evaluate_each_row_once(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    held_out: list[int] = []
    for fold in range(3):
        split = f"{{folds: 3, fold: {fold}, by: class}}"
        assert runs(f"{fold}", *UNEVEN, "--data.split", split, "--debug.ledger", "true") == 0
        trained = set(_ids(runs, f"{fold}"))
        held_out += sorted(set(range(203)) - trained)
        assert runs.results(f"{fold}")["models"]["fp32"]["count"] == 203 - len(trained)
        assert check_ledger(runs.folder / f"{fold}").ok
    assert sorted(held_out) == list(range(203))
    assert "data.split: 136 of 203 rows to train, 67 to evaluate" in capsys.readouterr().out


@pytest.mark.heavy
def test_a_dataset_without_an_evaluation_set_says_how_to_make_one(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs("a", "--data.name", "no_evaluation_set", "--data.args", "{}") == EXIT_FAILED
    assert "--data.split.eval 0.1 makes one of a tenth of its training rows" in capsys.readouterr().err
    given = ["--data.split", "{eval: 0.2, by: group}", "--data.sampling.weights", "class_balanced"]
    assert runs("a", *UNEVEN, *given, "--debug.ledger", "true") == 0
    assert check_ledger(runs.folder / "a").ok
    assert len({number // 7 for number in _ids(runs, "a")}) <= 24


@dist_train.register_dataset("no_evaluation_set")
def no_evaluation_set(data: DataConfig) -> dist_train.Splits:
    return dist_train.Splits(Uneven(), None, num_classes=6)


@pytest.mark.heavy
def test_the_parts_are_kept_at_a_resume(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    split = ["--data.split", "{eval: 0.2, by: class, seed: 4}", "--debug.ledger", "true"]
    assert runs("whole", *split, "--task.name", "interruptible") == 0
    assert runs("a", *split, interrupt_at=12) == -1
    assert runs("a", "--data.split", "{eval: 0.2, by: class, seed: 5}", "--task.name", "interruptible") == EXIT_CONFIG
    assert "data.split.seed: was 4, is 5" in capsys.readouterr().err
    assert runs("a", *split, "--task.name", "interruptible") == 0
    assert runs.product("a") == runs.product("whole") and check_ledger(runs.folder / "a").ok
