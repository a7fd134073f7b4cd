"""The ledger proves that each sample was consumed once an epoch, and is not fooled by restarts and kills."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from dist_train.errors import RunDirError
from dist_train.run_dir.expectation import Draw, Expectation
from dist_train.run_dir.files import LineFile
from dist_train.run_dir.ledger import Ledger, NoLedger, check, read_steps, record_expectation
from dist_train.run_dir.paths import RunDir

SAMPLES, BATCH = 10, 4


def plan(world_size: int, epoch: int, step: int) -> list[list[int]]:
    """Ids of each rank at a step: three steps an epoch, of 4, 4 and 2 rows."""
    ids = [(number + 3 * epoch) % SAMPLES for number in range(BATCH * step, min(BATCH * (step + 1), SAMPLES))]
    bounds = [len(ids) * rank // world_size for rank in range(world_size + 1)]
    return [ids[start:end] for start, end in itertools.pairwise(bounds)]


def write(
    path: Path, world_size: int, attempt: int, steps: Iterable[int], stage: str = "train", skipped: bool = False
) -> None:
    """An attempt that does `steps`, of three steps an epoch."""
    record_expectation(RunDir(path), SAMPLES, SAMPLES)
    ledgers = [Ledger(RunDir(path), rank, world_size, attempt) for rank in range(world_size)]
    for step in steps:
        for ledger, ids in zip(ledgers, plan(world_size, step // 3, step % 3), strict=True):
            ledger.record(stage, step // 3, step, ids, skipped)
    for ledger in ledgers:
        ledger.sync()
        ledger.close()


def edit(path: Path, rank: int, line: int, **changes: object) -> None:
    file = RunDir(path).ledger_of(rank)
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    lines[line] |= changes
    file.write_text("".join(json.dumps(entry) + "\n" for entry in lines))


def test_a_perfect_ledger_is_ok(tmp_path: Path) -> None:
    write(tmp_path, 2, 0, range(6))
    write(tmp_path, 2, 0, range(3), stage="qat")
    report = check(tmp_path)
    assert report.ok, report
    assert report.epochs == {("train", 0): 10, ("train", 1): 10, ("qat", 0): 10}
    assert "each sample was consumed exactly once an epoch" in str(report)


def test_lines_hold_what_the_contract_says(tmp_path: Path) -> None:
    write(tmp_path, 2, 3, [0])
    line = json.loads(RunDir(tmp_path).ledger_of(1).read_text())
    assert line == {
        "attempt": 3,
        "world_size": 2,
        "stage": "train",
        "epoch": 0,
        "step": 0,
        "ids": [2, 3],
        "skipped": False,
    }


def test_a_repeated_id_is_a_problem(tmp_path: Path) -> None:
    write(tmp_path, 2, 0, range(3))
    edit(tmp_path, 1, 0, ids=[2, 3, 0])
    report = check(tmp_path)
    assert not report.ok and report.problems == ["train epoch 0: 1 samples more than once, such as [0]"]


def test_a_missing_id_is_a_problem_when_the_epoch_is_over(tmp_path: Path) -> None:
    write(tmp_path, 2, 0, range(6))
    edit(tmp_path, 1, 1, ids=[6])
    assert check(tmp_path).problems == ["train epoch 0: 9 of 10 samples"]


def test_an_epoch_under_way_is_unfinished_and_not_a_problem(tmp_path: Path) -> None:
    write(tmp_path, 2, 0, range(5))
    report = check(tmp_path)
    assert not report.ok and report.problems == [] and report.unfinished == ["train epoch 1: 8 of 10 samples"]


def test_an_id_that_the_training_set_does_not_have_is_a_problem(tmp_path: Path) -> None:
    write(tmp_path, 2, 0, range(3))
    edit(tmp_path, 0, 0, ids=[0, 10])
    assert any(
        "ids that the training set does not have, such as [10]" in problem for problem in check(tmp_path).problems
    )


def test_a_skipped_steps_samples_were_consumed_and_are_reported(tmp_path: Path) -> None:
    write(tmp_path, 2, 0, range(2))
    write(tmp_path, 2, 0, [2], skipped=True)
    report = check(tmp_path)
    assert report.ok and report.skipped == {"train": (1, 2)}, report
    assert "train: 1 steps were skipped, as fp16 gradients overflowed; nothing was learned from their 2 samples" in str(
        report
    )


def test_ranks_that_disagree_about_a_skipped_step_are_a_problem(tmp_path: Path) -> None:
    write(tmp_path, 2, 0, range(3))
    edit(tmp_path, 1, 0, skipped=True)
    assert check(tmp_path).problems == ["train step 0: some ranks skipped it and some did not"]


def test_samples_that_were_left_out_are_accounted_for_and_said(tmp_path: Path) -> None:
    write(tmp_path, 2, 0, range(6))
    lines = [json.loads(text) for text in RunDir(tmp_path).ledger_of(1).read_text().splitlines()]
    gone = lines[1]["ids"]
    edit(tmp_path, 1, 1, ids=[], left_out=gone)
    report = check(tmp_path)
    assert report.ok and report.left_out == {("train", 0): set(gone)}
    assert report.epochs == {("train", 0): SAMPLES - len(gone), ("train", 1): SAMPLES}
    assert f"train epoch 0: {len(gone)} samples left out" in str(report)
    assert "each sample that can be decoded was consumed" in str(report)
    edit(tmp_path, 1, 1, ids=gone)
    assert any("consumed and left out" in problem for problem in check(tmp_path).problems)
    edit(tmp_path, 1, 1, ids=[], left_out=gone[1:])
    assert not check(tmp_path).ok, "one is neither here nor there"


def test_of_a_repeated_step_the_highest_attempt_counts(tmp_path: Path) -> None:
    write(tmp_path, 2, 0, range(5))
    write(tmp_path, 2, 1, range(3, 6))
    assert check(tmp_path).ok
    assert [line["attempt"] for line in read_steps(tmp_path)["train", 4]] == [1, 1]


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 3), (3, 1), (1, 3)])
def test_the_world_size_may_change_between_attempts(before: int, after: int, tmp_path: Path) -> None:
    write(tmp_path, before, 0, range(5))
    write(tmp_path, after, 1, range(3, 6))
    assert check(tmp_path).ok, check(tmp_path)
    assert [len(read_steps(tmp_path)["train", step]) for step in (2, 3, 4)] == [before, after, after]


def test_repeating_with_other_samples_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, 2, 0, range(6))
    write(tmp_path, 2, 1, [4])
    edit(tmp_path, 0, 6, ids=[1, 2])  # the repetition of step 4 by attempt 1
    report = check(tmp_path)
    assert not report.ok and any("train epoch 1" in problem for problem in report.problems)


def test_a_line_torn_by_a_kill_does_not_count(tmp_path: Path) -> None:
    write(tmp_path, 2, 0, range(6))
    whole = check(tmp_path)
    with RunDir(tmp_path).ledger_of(1).open("ab") as file:
        file.write(b'{"attempt":0,"world_size":2,"stage":"train","epoch":2,"st')
    assert check(tmp_path) == whole


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    write(tmp_path, 1, 0, range(3))
    file = RunDir(tmp_path).ledger_of(0)
    lines = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join([lines[0], lines[1][:20], *lines[2:]]))
    with pytest.raises(RunDirError, match=r"rank0\.jsonl:2 is not a ledger line"):
        check(tmp_path)


def test_a_rank_without_a_line_is_a_problem(tmp_path: Path) -> None:
    write(tmp_path, 3, 0, range(3))
    file = RunDir(tmp_path).ledger_of(2)
    file.write_bytes(b"\n".join(file.read_bytes().split(b"\n")[:2]) + b"\n")
    assert "train step 2: 2 of 3 ranks have a line" in check(tmp_path).problems


def test_a_gap_in_the_steps_is_a_problem(tmp_path: Path) -> None:
    write(tmp_path, 1, 0, [0, 2])
    assert "train: step 2 follows step 0" in check(tmp_path).problems


def test_with_drop_last_the_rest_is_not_expected_and_not_allowed(tmp_path: Path) -> None:
    write(tmp_path, 2, 0, [0, 1])
    record_expectation(RunDir(tmp_path), SAMPLES, 8)
    assert check(tmp_path).ok and check(tmp_path).epochs == {("train", 0): 8}
    write(tmp_path, 2, 0, [2])
    record_expectation(RunDir(tmp_path), SAMPLES, 8)
    assert check(tmp_path).problems == ["train epoch 0: 10 samples, and drop_last leaves only 8"]


def test_without_a_ledger_it_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="has no ledger") as caught:
        check(tmp_path)
    assert "--debug.ledger true" in caught.value.hint


def test_without_its_expectation_a_ledger_is_compared_with_itself(tmp_path: Path) -> None:
    write(tmp_path, 1, 0, range(6))
    (RunDir(tmp_path).ledger / "expected.json").unlink()
    (lost,) = check(tmp_path).problems
    assert "expected.json is missing, so that nobody can tell whether a sample is missing from all epochs" in lost
    edit(tmp_path, 0, 2, ids=[8])  # of the first epoch; the second still has all ten
    assert check(tmp_path).problems == [lost, "train epoch 0: 9 of 10 samples"]


@pytest.mark.parametrize("line", ['{"ids": 3}', "[]", "3", '{"stage": "train"}', '"\\u0000"'])
def test_a_line_that_is_json_and_no_line_is_named(line: str, tmp_path: Path) -> None:
    write(tmp_path, 1, 0, range(6))
    file = RunDir(tmp_path).ledger_of(0)
    file.write_text(line + "\n" + file.read_text())
    with pytest.raises(RunDirError, match=r"rank0\.jsonl:1 is not a ledger line"):
        check(tmp_path)


def test_a_damaged_expectation_is_named(tmp_path: Path) -> None:
    write(tmp_path, 1, 0, range(6))
    (RunDir(tmp_path).ledger / "expected.json").write_text("{}")
    with pytest.raises(RunDirError, match=r"expected\.json is damaged"):
        check(tmp_path)


def test_no_ledger_writes_nothing(tmp_path: Path) -> None:
    ledger = NoLedger()
    ledger.record("train", 0, 0, [1], False)
    ledger.sync()
    ledger.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("torn", [1, 100, 65535, 65536, 65537, 200_000])
@pytest.mark.parametrize("whole", [0, 1, 65535, 65536, 131_072])
def test_an_opened_line_file_has_no_torn_line(torn: int, whole: int, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    first = b'{"a":"' + b"x" * (whole - 9) + b'"}\n' if whole > 9 else b"\n" * whole
    path.write_bytes(first + b'{"b":"' + b"y" * (torn - 1))
    file = LineFile(path)
    file.append({"c": 1})
    file.close()
    assert path.read_bytes() == first + b'{"c":1}\n'


def test_a_whole_line_file_is_only_added_to(tmp_path: Path) -> None:
    for number in range(3):
        file = LineFile(tmp_path / "deep" / "lines.jsonl")
        file.append({"number": number})
        file.flush()
        assert (tmp_path / "deep" / "lines.jsonl").read_text().endswith(f'{{"number":{number}}}\n')
        file.close()
    assert len((tmp_path / "deep" / "lines.jsonl").read_text().splitlines()) == 3


DRAW = Draw(
    weights=np.ones(SAMPLES),
    seed=0,
    replacement=True,
    samples=SAMPLES,
    global_batch_size=BATCH,
    drop_last=False,
    steps_per_epoch=3,
)


def drawn(path: Path, ids: np.ndarray | None = None) -> None:
    record_expectation(RunDir(path), SAMPLES, SAMPLES, Expectation(ids, DRAW))


def replay(draw: Draw, ids: np.ndarray | None) -> Callable[[str, int], list[int]]:
    """The draw of `plan`."""
    assert (draw.weights == 1).all() and draw.global_batch_size == BATCH
    return lambda stage, step: [n if ids is None else int(ids[n]) for n in plan(1, step // 3, step % 3)[0]]


def test_a_draw_is_compared_step_by_step_whichever_rank_had_a_sample(tmp_path: Path) -> None:
    write(tmp_path, 2, 0, range(6))
    drawn(tmp_path)
    report = check(tmp_path, replay)
    assert report.ok and report.drawn and "exactly the samples that were drawn for it" in str(report)
    edit(tmp_path, 0, 1, ids=[4, 4])
    report = check(tmp_path, replay)
    assert report.problems == [
        "train step 1: it consumed 1 that were not drawn, such as [4], and not 1 that were, such as [5]"
    ]


def test_a_drawn_sample_that_cannot_be_decoded_is_told(tmp_path: Path) -> None:
    write(tmp_path, 2, 0, range(6))
    drawn(tmp_path)
    edit(tmp_path, 1, 1, ids=[6], left_out=[7])
    assert check(tmp_path, replay).ok


def test_a_drawn_epoch_under_way_is_not_finished(tmp_path: Path) -> None:
    write(tmp_path, 1, 0, range(5))
    drawn(tmp_path)
    report = check(tmp_path, replay)
    assert not report.problems and report.unfinished == ["train epoch 1: 8 of 10 samples"]


def test_ids_of_a_part_of_a_dataset(tmp_path: Path) -> None:
    write(tmp_path, 1, 0, range(3))
    record_expectation(RunDir(tmp_path), SAMPLES, SAMPLES, Expectation(np.arange(SAMPLES)))
    assert check(tmp_path).ok
    record_expectation(RunDir(tmp_path), SAMPLES, SAMPLES, Expectation(np.arange(SAMPLES) + 1))
    assert check(tmp_path).problems == ["train epoch 0: ids that the training set does not have, such as [0]"]


def test_a_stage_that_went_on_from_another_run_begins_where_it_did(tmp_path: Path) -> None:
    write(tmp_path, 1, 0, range(4, 9))
    assert not check(tmp_path).ok
    first = {"train": {"step": 4, "consumed": BATCH}}
    record_expectation(RunDir(tmp_path), SAMPLES, SAMPLES, Expectation(first=first))
    report = check(tmp_path)
    assert report.ok, report
    assert report.epochs == {("train", 1): 6, ("train", 2): 10}


@pytest.mark.parametrize(
    "changes", [{"draw": {"seed": 1}}, {"draw": 3}, {"first": {"train": {}}}, {"ids_sha256": 5}, {"draw": {"a": 1}}]
)
def test_damaged_parts_of_an_expectation_are_named(changes: dict[str, object], tmp_path: Path) -> None:
    write(tmp_path, 1, 0, range(3))
    path = RunDir(tmp_path).ledger / "expected.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(RunDirError, match="is damaged"):
        check(tmp_path, replay)
