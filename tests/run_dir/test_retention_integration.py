"""Real checkpoints of real runs: which are there when a run is interrupted, and that what is needed never goes."""

from __future__ import annotations

from pathlib import Path

from tests.support.small_runs import STEPS, Runs

EVERY = ["--checkpoint.every_steps", "4", "--train.epochs", "4"]


def steps_kept(runs: Runs, name: str) -> set[int]:
    return {int(each.removeprefix("train-")) for each in runs.checkpoints(name).names()}


def test_the_newest_and_the_best_evaluated_are_there_at_an_interruption(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    settings = [*EVERY, "--checkpoint.keep", "{last: 2, best: 2}", "--train.select_by", "loss"]
    assert runs("run", *settings, interrupt_at=3 * STEPS + 6) == -1
    losses = {line["step"] + 1: line["eval_loss"] for line in runs.metrics("run") if "eval_loss" in line}
    best = sorted(losses, key=lambda step: losses[step])[:2]
    assert len(losses) == 3 and steps_kept(runs, "run") == {*best, 33, 36}


def test_the_hours_are_counted_across_restarts(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    # So short a time is always over at the next checkpoint: all but the first one, from which it is counted, stay.
    settings = [*EVERY, "--checkpoint.keep", "{last: 1, best: 0, every_hours: 1.0e-12}"]
    assert runs("run", *settings, interrupt_at=14) == -1
    assert steps_kept(runs, "run") == {8, STEPS, 12}
    assert runs("run", *settings, interrupt_at=6) == -1  # 18 in all
    assert steps_kept(runs, "run") == {8, STEPS, 12, 16}
    assert runs("run", *settings, "--task.name", "interruptible") == 0
    assert runs.checkpoints("run").names() == ["train-end"], "until the stage ends"


def test_what_select_best_hands_on_is_kept_whatever_the_settings_say(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    slow = [
        "--train.optim.lr",
        "0.05",
        "--train.schedule",
        "{warmup: 0.9}",
        "--train.select",
        "best",
        "--train.epochs",
        "6",
    ]
    settings = [*slow, "--checkpoint.every_steps", "4", "--checkpoint.keep", "{last: 1, best: 0}"]
    assert runs("broken", *settings, interrupt_at=5 * STEPS + 5) == -1
    measured = {line["step"] + 1: line["eval_top1"] for line in runs.metrics("broken") if "eval_top1" in line}
    best = max(measured, key=lambda step: measured[step])
    assert steps_kept(runs, "broken") == {best, 5 * STEPS + 5}, "the best and the newest, which is another"
    assert runs("broken", *settings, "--task.name", "interruptible") == 0
    assert runs("whole", *settings, "--task.name", "interruptible") == 0
    assert runs.product("broken") == runs.product("whole")
    assert runs.results("broken")["stages"]["train"]["selected"] == runs.results("whole")["stages"]["train"]["selected"]
