"""The ledger: records the samples of each rank and step, and checks that each was consumed once per epoch."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_train.errors import RunDirError
from dist_train.run_dir.files import LineFile, read_json, replace_json
from dist_train.run_dir.paths import RunDir


class Ledger:
    """Writes one rank's lines; `debug.ledger: false` gives `NoLedger`."""

    def __init__(self, run_dir: RunDir, rank: int, world_size: int, attempt: int) -> None:
        self._file = LineFile(run_dir.ledger_of(rank))
        self._fixed = {"attempt": attempt, "world_size": world_size}

    def record(
        self, stage: str, epoch: int, step: int, ids: list[int], skipped: bool, left_out: Sequence[int] = ()
    ) -> None:
        """Adds an optimizer step.

        Args:
            ids: read from the dataset together with the tensors that entered forward.
            left_out: ids of samples that could not be decoded.
        """
        line = {**self._fixed, "stage": stage, "epoch": epoch, "step": step, "ids": ids, "skipped": skipped}
        self._file.append({**line, "left_out": list(left_out)} if left_out else line)

    def sync(self) -> None:
        """Writes the lines to the disk; called before the checkpoint that covers them commits."""
        self._file.sync()

    def close(self) -> None:
        self._file.close()


class NoLedger:
    """Records nothing."""

    def record(
        self, stage: str, epoch: int, step: int, ids: list[int], skipped: bool, left_out: Sequence[int] = ()
    ) -> None:
        return

    def sync(self) -> None:
        return

    def close(self) -> None:
        return


def record_expectation(run_dir: RunDir, train_samples: int, per_epoch: int) -> None:
    """Writes the number of samples, and the number that an epoch must consume; called by rank 0."""
    run_dir.ledger.mkdir(parents=True, exist_ok=True)
    replace_json(run_dir.ledger / "expected.json", {"train_samples": train_samples, "per_epoch": per_epoch})


@dataclass
class LedgerReport:
    """Result of `check`.

    Attributes:
        epochs: (stage, epoch) -> samples consumed.
        left_out: (stage, epoch) -> ids of samples that could not be decoded, if any.
        problems: descriptions of errors; empty for a perfect ledger.
        unfinished: descriptions of stages' last epochs that are still under way.
        skipped: stage -> number of steps whose fp16 gradients overflowed, and their samples. These samples went through
            the model in their turn, but no weight learned from them. Loss scaling works like that, so it is reported
            and no problem.
    """

    epochs: dict[tuple[str, int], int] = field(default_factory=dict)
    left_out: dict[tuple[str, int], set[int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    skipped: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.problems and not self.unfinished

    def __str__(self) -> str:
        lines = [f"{stage} epoch {epoch}: {count} samples" for (stage, epoch), count in self.epochs.items()]
        lines += [
            f"{stage}: {steps} steps were skipped, as fp16 gradients overflowed; "
            f"nothing was learned from their {samples} samples"
            for stage, (steps, samples) in self.skipped.items()
        ]
        lines += [
            f"{stage} epoch {epoch}: {len(ids)} samples left out, which cannot be decoded, such as {sorted(ids)[:5]}"
            for (stage, epoch), ids in self.left_out.items()
        ]
        lines += [f"PROBLEM: {problem}" for problem in self.problems] + [
            f"not finished: {text}" for text in self.unfinished
        ]
        verdict = (
            f"each sample {'that can be decoded ' if self.left_out else ''}was consumed exactly once an epoch"
            if self.ok
            else "this ledger does not show that each sample was consumed exactly once an epoch"
        )
        return "\n".join([*lines, verdict])


def read_steps(run_dir: Path) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Reads (stage, step) -> its lines, one per rank; of a repeated step only the highest attempt's lines."""
    folder = RunDir(run_dir).ledger
    files = sorted(folder.glob("rank*.jsonl"))
    if not files:
        raise RunDirError(
            f"{run_dir} has no ledger", f"run with --debug.ledger true, then: dist-train ledger {run_dir}"
        )
    steps: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for file in files:
        lines = file.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            try:
                entry = json.loads(line)
            except ValueError:
                if number == len(lines):
                    continue  # torn by a kill; no checkpoint covers its step
                raise RunDirError(
                    f"{file}:{number} is not a ledger line", "the file was changed by hand, or the disk is damaged"
                ) from None
            known = steps[entry["stage"], entry["step"]]
            if known and entry["attempt"] > known[0]["attempt"]:
                known.clear()
            if not known or entry["attempt"] == known[0]["attempt"]:
                known.append(entry)
    return steps


def check(run_dir: Path) -> LedgerReport:
    """Checks that each sample of the training set was consumed exactly once in each epoch.

    Raises:
        RunDirError: there is no ledger, or it cannot be read.
    """
    steps = read_steps(run_dir)
    expected = read_json(RunDir(run_dir).ledger / "expected.json")
    if expected is None:
        # A ledger without its run is compared with itself: each epoch must hold every sample of any epoch.
        seen = {
            number for lines in steps.values() for line in lines for number in [*line["ids"], *line.get("left_out", [])]
        }
        expected = {"train_samples": max(seen, default=-1) + 1, "per_epoch": len(seen)}
    report = LedgerReport()
    epochs: dict[tuple[str, int], Counter[int]] = defaultdict(Counter)
    last: dict[str, int] = {}
    order = list(dict.fromkeys(stage for stage, _ in steps))
    for (stage, step), lines in sorted(steps.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        if len(lines) != lines[0]["world_size"]:
            report.problems.append(f"{stage} step {step}: {len(lines)} of {lines[0]['world_size']} ranks have a line")
        if step != last.get(stage, -1) + 1:
            report.problems.append(f"{stage}: step {step} follows step {last.get(stage, -1)}")
        last[stage] = step
        if len({line["skipped"] for line in lines}) > 1:
            report.problems.append(f"{stage} step {step}: some ranks skipped it and some did not")
        if any(line["skipped"] for line in lines):
            before, samples = report.skipped.get(stage, (0, 0))
            report.skipped[stage] = before + 1, samples + sum(len(line["ids"]) for line in lines)
        for line in lines:
            epochs[stage, line["epoch"]].update(line["ids"])
            if line.get("left_out"):
                report.left_out.setdefault((stage, line["epoch"]), set()).update(line["left_out"])
    for (stage, epoch), ids in epochs.items():
        report.epochs[stage, epoch] = ids.total()
        repeated = [number for number, times in ids.items() if times > 1]
        if repeated:
            report.problems.append(
                f"{stage} epoch {epoch}: {len(repeated)} samples more than once, such as {repeated[:5]}"
            )
        foreign = [number for number in ids if not 0 <= number < expected["train_samples"]]
        if foreign:
            report.problems.append(
                f"{stage} epoch {epoch}: ids that the training set does not have, such as {foreign[:5]}"
            )
        left_out = report.left_out.get((stage, epoch), set())
        both = sorted(left_out & ids.keys())
        if both:
            report.problems.append(f"{stage} epoch {epoch}: consumed and left out, such as {both[:5]}")
        if len(ids) + len(left_out) < expected["per_epoch"]:
            later = (stage, epoch + 1) in epochs
            text = f"{stage} epoch {epoch}: {len(ids)} of {expected['per_epoch']} samples"
            (report.problems if later else report.unfinished).append(text)
        if len(ids) > expected["per_epoch"]:
            report.problems.append(
                f"{stage} epoch {epoch}: {len(ids)} samples, and drop_last leaves only {expected['per_epoch']}"
            )
    return report
