"""The page of guarantees: what a run survives, by the tests that show it, with their own results.

    python -m tests.guarantees              run the tests of all rows, and write the record and the page's table
    python -m tests.guarantees --missing    run those of the rows that the record does not have

Tests are those of real gloo ranks, signals and disks. The record holds how many of a row's tests passed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "guarantees.md"
RECORD = Path(__file__).with_name("guarantees.json")
_BEGIN, _END = "<!-- guarantees -->\n", "<!-- /guarantees -->"


@dataclass(frozen=True)
class Row:
    """A fault of a run.

    Attributes:
        lost: what has to be done again, or is gone.
        tests: ids as of pytest, from the folder tests/ and without parameters; all of them must show it.
    """

    fault: str
    happens: str
    lost: str
    tests: tuple[str, ...]


_EXACT = "pipeline/test_exactness_integration.py::"
_RECOVERY = "pipeline/test_recovery_integration.py::"
_STOPS = "distributed/watchdog/test_stop_signals_integration.py::"
_WATCHDOG = "distributed/watchdog/test_watchdog_integration.py::"
_SECOND = "distributed/watchdog/test_second_start_integration.py::"
_DISK = "run_dir/test_failing_disk_integration.py::"
_REPLICAS = "strategies/test_ft_integration.py::"
_NODES = "launchers/test_namespaces_integration.py::"

_FLIGHT = "run_dir/test_saves_in_flight_integration.py::"
_SHARDS = "run_dir/test_sharded_runs_integration.py::"

ROWS = (
    Row(
        "SIGKILL of one rank or of all, at any moment",
        "the other ranks end and say why; the same command ends with the bytes of an undisturbed run",
        "the steps since the last checkpoint",
        (
            f"{_EXACT}test_killed_at_random_moments_a_run_ends_like_an_undisturbed_one",
            f"{_EXACT}test_killed_before_and_after_every_boundary_a_run_ends_like_an_undisturbed_one",
        ),
    ),
    Row(
        "SIGKILL of rank 0 or of all while a checkpoint is written",
        "the older checkpoint is in force; the same command ends with the bytes of an undisturbed run",
        "the steps since the older checkpoint",
        (f"{_FLIGHT}test_killed_with_a_save_in_flight_a_run_ends_like_an_undisturbed_one",),
    ),
    Row(
        "SIGKILL of any rank while the ranks write their shards (`strategy: fsdp`)",
        "the older checkpoint is in force, or the new one is whole; the same command ends with the bytes of an "
        "undisturbed run",
        "the steps since the checkpoint in force",
        (f"{_SHARDS}test_killed_with_shards_in_flight_a_run_ends_like_an_undisturbed_one",),
    ),
    Row(
        "a checkpoint that cannot be written, found while training goes on",
        "all ranks end in words at the next step; with room, the same command goes on",
        "the steps since the last checkpoint",
        (
            f"{_FLIGHT}test_an_error_of_the_thread_ends_all_ranks_in_the_words_of_a_save_that_waits",
            f"{_SHARDS}test_a_full_disk_of_another_rank_ends_all_ranks_in_words",
        ),
    ),
    Row(
        "SIGTERM or SIGUSR2 to one rank or to all, or the file STOP",
        "all ranks stop after the same step, with one checkpoint; exit code 75",
        "nothing",
        (
            f"{_STOPS}test_a_signal_to_one_rank_stops_all_after_the_same_step_with_one_checkpoint",
            f"{_STOPS}test_the_file_stop_ends_the_run_and_is_gone_then",
            f"{_STOPS}test_all_processes_are_told_at_any_moment_and_end_at_the_next_step_as_if_nothing_had_been",
        ),
    ),
    Row(
        "a stop during a step that takes longer than `stop.grace`",
        "the step is given up; exit code 75",
        "the steps since the last checkpoint",
        (f"{_STOPS}test_a_step_that_is_longer_than_the_grace_is_given_up_and_the_last_checkpoint_serves",),
    ),
    Row(
        "another number of ranks after a kill",
        "the run goes on; each sample is in one step of an epoch",
        "the steps since the last checkpoint",
        ("pipeline/test_pipeline_integration.py::test_a_run_of_three_ranks_goes_on_with_two",),
    ),
    Row(
        "the newest checkpoint damaged, for all ranks or for one",
        "all ranks agree on the newest that is whole; the damaged one is named and kept",
        "one interval of checkpoints at most",
        (f"{_RECOVERY}test_a_flipped_byte_of_the_tensors", f"{_RECOVERY}test_damage_that_one_rank_alone_reads"),
    ),
    Row(
        "the end of a stage damaged, `latest.json`, status.json, environment.json and config.yaml lost",
        "found from the folder, and rebuilt from the checkpoints",
        "nothing",
        (f"{_RECOVERY}test_the_end_of_a_stage_while_the_next_one_runs",),
    ),
    Row(
        "all checkpoints damaged",
        "all ranks end and name the files; nothing is removed",
        "what no backup has",
        (f"{_RECOVERY}test_where_none_verifies_all_ranks_end_in_words",),
    ),
    Row(
        "a second start on the directory of a living run",
        "the second is refused, and names process and host of the first",
        "nothing: no byte of the first changes",
        (
            f"{_SECOND}test_a_second_start_changes_no_byte_of_a_living_run",
            f"{_SECOND}test_a_start_goes_on_as_soon_as_the_owner_was_killed",
        ),
    ),
    Row(
        "an owner frozen, and taken over by another start",
        "the first ends when it wakes, and touches nothing",
        "the steps since the last checkpoint",
        (f"{_SECOND}test_a_frozen_owner_that_was_taken_over_ends_without_touching_the_new_one",),
    ),
    Row(
        "a disk that is full, or fails, for a moment",
        "writing is tried again for `checkpoint.retry` seconds",
        "nothing",
        (f"{_DISK}test_a_run_outlives_a_disk_that_is_full_for_a_moment",),
    ),
    Row(
        "a disk that stays full",
        "the run ends in words; with room, the same command goes on",
        "the steps since the last checkpoint",
        (f"{_DISK}test_a_disk_that_stays_full_ends_the_run_in_words_and_it_resumes",),
    ),
    Row(
        "a rank that is slow: a save, a dataset, a tracker",
        "the others wait, up to `watchdog.timeout`",
        "nothing",
        (
            f"{_WATCHDOG}test_a_rank_that_is_slow_is_not_dead",
            f"{_WATCHDOG}test_a_run_that_goes_on_slowly_is_left_alone",
        ),
    ),
    Row(
        "a rank that is stuck, in Python, in C or stopped",
        "all end after `watchdog.timeout`; rank and phase are named, the stacks of all kept",
        "the steps since the last checkpoint",
        (
            f"{_WATCHDOG}test_the_message_names_the_rank_and_the_phase_and_the_stacks_are_kept",
            f"{_WATCHDOG}test_a_stopped_process_is_named_and_does_not_stay",
            f"{_WATCHDOG}test_a_rank_that_is_frozen_with_its_watcher_is_named_with_its_process",
        ),
    ),
    Row(
        "a rank that leaves as if it were done: `sys.exit(0)`, `os._exit(0)`",
        "the run fails, on every rank, with its reason",
        "the steps since the last checkpoint",
        ("pipeline/test_ends_of_ranks_integration.py::test_a_rank_that_leaves_as_if_it_were_done_fails_the_run",),
    ),
    Row(
        "a loss that is not finite on one rank",
        "all stop before the update, and name step and rank",
        "the steps since the last checkpoint",
        (
            "training/test_loop_integration.py::test_a_loss_that_is_not_finite_on_one_rank_stops_all_and_names_step_and_rank",
        ),
    ),
    Row(
        "state that follows one rank's own rows",
        "averaged where that is meant, else refused by name",
        "nothing",
        ("training/test_same_state_integration.py::test_state_of_own_rows_is_refused_on_every_rank_by_name",),
    ),
    Row(
        "other data on a rank: rows, content, classes",
        "refused at set-up, and the ranks named; a changed picture or item at a resume",
        "nothing",
        ("pipeline/test_same_data_integration.py",),
    ),
    Row(
        "a node of an elastic job (`--nodes 1:2`) is told to leave",
        "the others meet again and go on with fewer ranks; each sample is in one step of an epoch",
        "nothing",
        ("launchers/test_elastic_integration.py::test_one_of_two_nodes_leaves_and_the_run_goes_on_to_its_end",),
    ),
    Row(
        "a replica under `strategy: ft` is killed, told to leave, or comes back",
        "the others do that step again and go on; each sample is in one committed step of an epoch, the weights are "
        "those of one process",
        "nothing",
        (
            f"{_REPLICAS}test_one_of_three_is_killed_and_comes_back_and_another_leaves",
            f"{_REPLICAS}test_statistics_and_workers_survive_a_step_that_is_done_again",
            f"{_REPLICAS}test_all_are_killed_and_go_on_from_the_newest_checkpoint",
        ),
    ),
    Row(
        "a machine that dies, and comes back",
        "with `launch torchrun --restarts R` it joins, and the run ends as an undisturbed one",
        "the steps since the last checkpoint",
        (f"{_NODES}test_a_machine_that_dies_and_comes_back_joins_the_run_which_ends_as_if_nothing_had_been",),
    ),
    Row(
        "a network that is cut",
        "all processes end; the same commands go on",
        "the steps since the last checkpoint",
        (f"{_NODES}test_without_a_network_all_processes_end_and_with_it_the_same_commands_end_the_run",),
    ),
    Row(
        "a Slurm job that is preempted, or killed with its node",
        "it requeues itself and goes on",
        "nothing; after a kill the steps since the last checkpoint",
        ("launchers/test_slurm_preemption_integration.py",),
    ),
)


def record() -> dict[str, str]:
    """Returns the outcome of each row by its fault, as `3 of 3 passed, 2026-11-29`."""
    recorded: dict[str, str] = json.loads(RECORD.read_text())
    return recorded


def table(outcomes: dict[str, str]) -> str:
    lines = ["| Fault | What happens | What is lost | Tests |", "|---|---|---|---|"]
    for row in ROWS:
        named = ", ".join(f"`{test.partition('::')[2] or test}`" for test in row.tests)
        lines.append(f"| {row.fault} | {row.happens} | {row.lost} | {outcomes[row.fault]}: {named} |")
    return "\n".join(lines) + "\n"


def block(page: str) -> str:
    return page.partition(_BEGIN)[2].partition(_END)[0]


def outcomes_of(tests: tuple[str, ...]) -> Counter[str]:
    """Runs these tests, and counts how they ended: passed, failed, skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            "0",
            "-m",
            "",
            "-o",
            "timeout=900",
            f"--junit-xml={report}",
        ]
        subprocess.run([*command, *(f"tests/{test}" for test in tests)], cwd=ROOT, check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    kinds = [
        next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed") for case in cases
    ]
    return Counter(kinds)


def main() -> int:
    import datetime

    outcomes = {} if "--missing" not in sys.argv else {row.fault: record().get(row.fault, "") for row in ROWS}
    for row in [row for row in ROWS if not outcomes.get(row.fault)]:
        found = outcomes_of(row.tests)
        others = "".join(f", {count} {kind}" for kind, count in sorted(found.items()) if kind != "passed")
        outcomes[row.fault] = f"{found['passed']} of {found.total()} passed{others}, {datetime.date.today()}"
        print(f"{row.fault}: {outcomes[row.fault]}", flush=True)
    RECORD.write_text(json.dumps(outcomes, indent=1) + "\n")
    before, begin, rest = PAGE.read_text().partition(_BEGIN)
    PAGE.write_text(before + begin + table(outcomes) + _END + rest.partition(_END)[2])
    return int(any("fail" in each or "error" in each for each in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
