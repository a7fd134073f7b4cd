"""More or fewer epochs: the refusal says how a new run goes on from the weights, of a finished and of a stopped run."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

import dist_train
from dist_train.config.data import ModelConfig
from dist_train.errors import EXIT_CONFIG, DataError
from dist_train.models.build import initial_weights
from dist_train.models.weights import read_run
from dist_train.strategies.single import Single
from tests.support.small_runs import STEPS, Runs

TINY_STEP = ["--train.optim.lr", "1e-30", "--train.epochs", "1"]


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def _model(runs: Runs, name: str, checkpoint: str) -> dict[str, torch.Tensor]:
    model: dict[str, torch.Tensor] = runs.checkpoints(name).load(checkpoint)["payload"]["model"]
    return model


def _same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.allclose(left[key], right[key]) for key in left)


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True])
def test_the_refusal_says_how_to_go_on_and_that_works(
    stopped: bool, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    first = runs.folder / "first run"
    at = STEPS + 5 if stopped else None
    assert runs("first run", "--checkpoint.every_steps", "3", interrupt_at=at) == (-1 if stopped else 0)
    capsys.readouterr()
    task = ["--task.name", "interruptible"] if stopped else []
    assert runs("first run", "--checkpoint.every_steps", "3", "--train.epochs", "5", *task) == EXIT_CONFIG
    said = capsys.readouterr().err
    assert "train.epochs: was 3, is 5" in said
    options = f"--run.dir NEW --model.init_from {shlex.quote(str(first))}"
    assert f"-> to go on from its weights in a new run: the same command with {options}\n" in said
    further = f"train.epochs in all: the same command with --run.dir NEW --train.extend_from {shlex.quote(str(first))}"
    assert further in said
    assert runs("first run", "--checkpoint.every_steps", "3", "--train.schedule.name", "constant", *task) == EXIT_CONFIG
    assert "extend_from" not in capsys.readouterr().err, "there are no more epochs to train"

    assert runs("second", "--model.init_from", str(first), *TINY_STEP) == 0
    printed = capsys.readouterr().out
    saved = f"train-{STEPS + 4:08d}" if stopped else "train-end"
    assert runs.checkpoints("first run").latest == saved
    assert _same(_model(runs, "second", "train-end"), _model(runs, "first run", saved))
    unfinished = f"starts from the run {first}; after step {STEPS + 4} of its unfinished stage train"
    assert (unfinished in printed) == stopped


@pytest.mark.slow
def test_a_run_that_began_with_weights_goes_on_without_them(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(runs.folder / "begin.pt")
    assert runs("first", *TINY_STEP) == 0
    torch.save({"model": _model(runs, "first", "train-end"), "model_ema": {}}, file)
    given = ["--model.weights", file, "--model.weights_key", "model"]
    assert runs("second", *TINY_STEP, *given) == 0
    assert runs("second", *TINY_STEP, *given, "--train.epochs", "2") == EXIT_CONFIG
    hint = capsys.readouterr().err.rpartition("the same command with ")[2].splitlines()[0].replace("NEW", "third")
    assert hint.endswith(" --model.weights null --model.weights_key null")
    assert runs("third", *TINY_STEP, *given, *shlex.split(hint.replace("--run.dir third ", ""))) == 0


@pytest.mark.heavy
def test_a_changed_model_is_not_offered_the_weights(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs("first", *TINY_STEP) == 0
    assert runs("first", *TINY_STEP, "--model.args", "{size: 8, hidden: 8}") == EXIT_CONFIG
    assert "init_from" not in capsys.readouterr().err


def test_a_run_without_a_checkpoint_has_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    found = initial_weights(ModelConfig(init_from=tmp_path))
    assert found is not None
    with pytest.raises(DataError, match="has no trained float model: it has saved no checkpoint yet"):
        found[1]()
    with pytest.raises(DataError, match="has no trained float model"):
        read_run(tmp_path / "nowhere")


class _Renamed(Single):
    """The strategy of one process under another name."""


def test_a_resume_says_that_its_strategy_is_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dist_train.register_strategy("renamed")(_Renamed)
    runs = Runs(tmp_path)
    assert runs("run", "--checkpoint.every_steps", "5", interrupt_at=7) == -1
    capsys.readouterr()
    assert runs("run", "--strategy", "renamed", interrupt_at=7) == -1
    assert "strategy renamed from here on; it was single" in capsys.readouterr().out
    assert runs("run", "--strategy", "renamed", "--task.name", "interruptible") == 0
    assert "from here on" not in capsys.readouterr().out
