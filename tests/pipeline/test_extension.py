"""`train.extend_from`: a new run goes on from another one's training, and ends as one that trained so long at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.errors import EXIT_CONFIG, EXIT_FAILED
from dist_train.finished_run.ledger import check_ledger
from tests.support.small_runs import STEPS, Runs

CONSTANT = ["--train.schedule.name", "constant", "--debug.ledger", "true", "--train.ema_decay", "0.9"]
FIVE = ["--train.epochs", "5"]


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def _extend(runs: Runs, name: str, source: str, *options: str) -> int:
    return runs(name, "--train.extend_from", str(runs.folder / source), *options)


@pytest.mark.slow
@pytest.mark.parametrize("optim", [["--train.optim.momentum", "0.9"], ["--train.optim", "{name: adamw, lr: 0.01}"]])
@pytest.mark.parametrize("stopped", [False, True])
def test_an_extended_run_has_the_bytes_of_one_that_trained_so_long_at_once(
    stopped: bool, optim: list[str], runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*CONSTANT, *optim, "--task.name", "interruptible", "--checkpoint.every_steps", "3"]
    assert runs("at once", *given, *FIVE) == 0
    assert runs("first", *given, interrupt_at=STEPS + 5 if stopped else None) == (-1 if stopped else 0)
    before = {path: path.read_bytes() for path in (runs.folder / "first").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert _extend(runs, "second", "first", *given, *FIVE) == 0
    assert f"after step {STEPS + 4 if stopped else 3 * STEPS}" in capsys.readouterr().out
    assert runs.product("second") == runs.product("at once")
    assert runs.results("second")["models"] == runs.results("at once")["models"]
    assert runs.results("second")["stages"]["train"]["began_at_step"] == (STEPS + 4 if stopped else 3 * STEPS)
    assert check_ledger(runs.folder / "second").ok, str(check_ledger(runs.folder / "second"))
    assert before == {path: path.read_bytes() for path in (runs.folder / "first").rglob("*") if path.is_file()}


@pytest.mark.slow
def test_an_extension_that_is_interrupted_resumes_by_itself(runs: Runs) -> None:
    given = [*CONSTANT, "--task.name", "interruptible", "--checkpoint.every_steps", "3"]
    assert runs("at once", *given, *FIVE) == 0 and runs("first", *given) == 0
    extended = ["--train.extend_from", str(runs.folder / "first"), *given, *FIVE]
    assert runs("second", *extended, interrupt_at=STEPS + 2) == -1
    (runs.folder / "first").rename(runs.folder / "gone")
    assert runs("second", *extended) == 0
    assert runs.product("second") == runs.product("at once") and check_ledger(runs.folder / "second").ok


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule",
    [
        "{name: ReduceLROnPlateau, args: {patience: 0, factor: 0.5, threshold: 10}}",
        "{name: ExponentialLR, every: epoch, args: {gamma: 0.5}}",
    ],
)
def test_schedules_that_step_at_the_ends_of_epochs_go_on(schedule: str, runs: Runs) -> None:
    given = ["--train.schedule", schedule]
    assert runs("at once", *given, *FIVE) == 0 and runs("first", *given) == 0
    assert _extend(runs, "second", "first", *given, *FIVE) == 0
    assert runs.product("second") == runs.product("at once")


@pytest.mark.heavy
def test_fewer_epochs_than_were_planned(runs: Runs) -> None:
    given = ["--task.name", "interruptible", "--checkpoint.every_steps", "3", "--train.schedule.name", "linear"]
    assert runs("first", *given, "--train.epochs", "9", interrupt_at=STEPS + 5) == -1
    assert _extend(runs, "second", "first", *given, "--train.epochs", "2") == 0
    rates = {line["step"]: line["lr"] for line in runs.metrics("second") if "lr" in line}
    assert min(rates) == STEPS + 4 and max(rates) == 2 * STEPS - 1
    assert rates[2 * STEPS - 1] == pytest.approx(0.02 / (2 * STEPS))  # the line from 0.02 to 0 over two epochs


@pytest.mark.slow
def test_the_best_epoch_is_one_of_the_new_run_and_the_last_state_is_what_goes_on(runs: Runs) -> None:
    given = ["--train.schedule.name", "constant", "--train.select", "best", "--train.optim.lr", "0.5"]
    plain = [*given[:2], *given[4:]]
    assert runs("first", *given) == 0 and runs("plain", *plain) == 0
    assert _extend(runs, "second", "first", *plain, *FIVE) == 0 and _extend(runs, "third", "plain", *plain, *FIVE) == 0
    assert runs.product("second") == runs.product("third")
    assert _extend(runs, "fourth", "first", *given, *FIVE) == 0
    assert runs.results("fourth")["stages"]["train"]["selected"]["step"] > 3 * STEPS


@pytest.mark.heavy
def test_parts_are_called_frozen_where_they_still_are(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    frozen = ["--train.freeze", "['1']", "--train.unfreeze_at", "1"]
    assert runs("first", "--train.epochs", "2", *frozen) == 0
    assert "train: freezes 2 parameters until epoch 1" in capsys.readouterr().out
    assert _extend(runs, "longer", "first", *frozen) == 0
    assert "freezes" not in capsys.readouterr().out


@pytest.mark.heavy
def test_what_cannot_be_extended_says_what_to_type(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs("first") == 0 and runs("bare", "--checkpoint.keep.training", "false") == 0
    cases = [
        (["--train.epochs", "3"], "first", EXIT_FAILED, "--train.epochs 4 or more"),
        (FIVE, "bare", EXIT_FAILED, "without keeping the optimizer's state"),
        (FIVE, "nowhere", EXIT_CONFIG, "is not a run directory"),
        ([*FIVE, "--train.optim.name", "adam"], "first", EXIT_CONFIG, "train.optim.name: was sgd, is adam"),
        ([*FIVE, "--data.global_batch_size", "10"], "first", EXIT_CONFIG, "data.global_batch_size: was 20, is 10"),
        ([*FIVE, "--model.args", "{size: 8, hidden: 8}"], "first", EXIT_CONFIG, "model.args: was"),
        ([*FIVE, "--train.ema_decay", "0.9"], "first", EXIT_FAILED, "set train.ema_decay as in that run"),
        ([*FIVE, "--stages", "[ptq]"], "first", EXIT_CONFIG, "needs the stage 'train'"),
    ]
    for options, source, code, said in cases:
        capsys.readouterr()
        assert _extend(runs, "new", source, *options) == code, options
        error = capsys.readouterr().err
        assert said in error, error
        if code == EXIT_CONFIG and ": was " in said:
            assert f"goes on from the training of {runs.folder / 'first'}" in error, error
            assert "--train.extend_from null --model.init_from" in error, error
    assert runs("first", "--train.extend_from", str(runs.folder / "first")) == EXIT_CONFIG
    assert "is the directory of this run itself" in capsys.readouterr().err
