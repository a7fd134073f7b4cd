"""The ledger: records the samples of each rank and step, and checks that each was consumed once, or as drawn."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.errors import RunDirError
from dist_train.run_dir.expectation import Draw, are_ints, expected
from dist_train.run_dir.expectation import record_expectation as record_expectation
from dist_train.run_dir.files import LineFile, read_json
from dist_train.run_dir.paths import RunDir
from dist_train.run_dir.replica_ledger import is_commit, ledgers_of, of_committed


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

    def announce(
        self, stage: str, epoch: int, step: int, ids: list[int], left_out: Sequence[int], ranks: int, trial: str
    ) -> None:
        return

    def record(
        self, stage: str, epoch: int, step: int, ids: list[int], skipped: bool, left_out: Sequence[int] = ()
    ) -> None:
        return

    def sync(self) -> None:
        return

    def close(self) -> None:
        return


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
        drawn: True if the samples were drawn by weight: each step is compared with its draw.
    """

    epochs: dict[tuple[str, int], int] = field(default_factory=dict)
    left_out: dict[tuple[str, int], set[int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    skipped: dict[str, tuple[int, int]] = field(default_factory=dict)
    drawn: bool = False

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
        told = f"each sample {'that can be decoded ' if self.left_out else ''}was consumed exactly once an epoch"
        if self.drawn:
            told = "each step consumed exactly the samples that were drawn for it by weight"
        if not self.ok:
            told = f"this ledger does not show that {told.replace('that can be decoded ', '')}"
        return "\n".join([*lines, told])


_NUMBERS = ("epoch", "step", "attempt", "world_size")


def _is_line(entry: Any) -> bool:
    """Tells whether a value that was read from a ledger is one rank's line of a step, or a replica's of a trial."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("stage"), str)
        and (isinstance(entry.get("skipped"), bool) or isinstance(entry.get("trial"), str))
        and are_ints(entry.get(name) for name in _NUMBERS)
        and all(isinstance(ids, list) and are_ints(ids) for ids in (entry.get("ids"), entry.get("left_out", [])))
    )


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            entry = json.loads(line)
            if not _is_line(entry) and not is_commit(entry):
                raise ValueError
        except ValueError:
            if number == len(lines):
                continue  # torn by a kill; no checkpoint covers its step
            raise RunDirError(
                f"{file}:{number} is not a ledger line", "the file was changed by hand, or the disk is damaged"
            ) from None
        yield entry


def read_steps(run_dir: Path) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Reads (stage, step) -> its lines, one per rank; of a repeated step only the highest attempt's lines.

    Of a folder of replicas: the lines of the trials that were committed, one per replica that took part.
    """
    if replicas := ledgers_of(run_dir):
        return of_committed(_lines(file) for folder in replicas for file in sorted(folder.glob("rank*.jsonl")))
    files = sorted(RunDir(run_dir).ledger.glob("rank*.jsonl"))
    if not files:
        raise RunDirError(
            f"{run_dir} has no ledger", f"run with --debug.ledger true, then: dist-train ledger {run_dir}"
        )
    steps: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for file in files:
        for entry in _lines(file):
            if "trial" in entry:
                raise RunDirError(
                    f"{run_dir} is one replica of a run, and its ledger tells its own share of each step",
                    f"dist-train ledger {run_dir.parent}, which reads those of all replicas",
                )
            known = steps[entry["stage"], entry["step"]]
            if known and entry["attempt"] > known[0]["attempt"]:
                known.clear()
            if not known or entry["attempt"] == known[0]["attempt"]:
                known.append(entry)
    return steps


BatchOf = Callable[[str, int], Sequence[int]]
"""Maps stage and step to the ids of its global batch."""


def check(run_dir: Path, replay: Callable[[Draw, np.ndarray | None], BatchOf] | None = None) -> LedgerReport:
    """Checks that each sample of the training set was consumed exactly once in each epoch, or as it was drawn.

    Args:
        replay: makes the draw again, from the settings of it and the ids of the rows (None: 0, 1, ...); needed for a
            run that draws by weight.

    Raises:
        RunDirError: there is no ledger, or it cannot be read.
    """
    steps = read_steps(run_dir)
    folder = next(iter(ledgers_of(run_dir)), RunDir(run_dir).ledger)
    recorded, report = read_json(folder / "expected.json"), LedgerReport()
    if recorded is None:
        # Compared with itself, a ledger shows what is repeated; not what is missing from all of its epochs.
        seen = {
            number for lines in steps.values() for line in lines for number in [*line["ids"], *line.get("left_out", [])]
        }
        recorded = {"train_samples": max(seen, default=-1) + 1, "per_epoch": len(seen)}
        report.problems.append(
            f"{folder / 'expected.json'} is missing, so that nobody can tell whether a sample is missing from all "
            "epochs"
        )
    total, per_epoch, more = expected(recorded, folder)
    allowed: Container[int] = range(total) if more.ids is None else set(more.ids.tolist())
    batch_of: BatchOf | None = None
    if more.draw is not None:
        assert replay is not None
        report.drawn, batch_of = True, replay(more.draw, more.ids)
    epochs: dict[tuple[str, int], Counter[int]] = defaultdict(Counter)
    undecoded: Counter[tuple[str, int]] = Counter()
    last = {stage: first["step"] - 1 for stage, first in more.first.items()}
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
                undecoded[stage, line["epoch"]] += len(line["left_out"])
        if batch_of is not None:
            report.problems += _not_as_drawn(stage, step, lines, batch_of(stage, step))
    for (stage, epoch), ids in epochs.items():
        report.epochs[stage, epoch] = ids.total()
        repeated = [number for number, times in ids.items() if times > 1]
        if repeated and not report.drawn:
            report.problems.append(
                f"{stage} epoch {epoch}: {len(repeated)} samples more than once, such as {repeated[:5]}"
            )
        foreign = [number for number in ids if number not in allowed]
        if foreign:
            report.problems.append(
                f"{stage} epoch {epoch}: ids that the training set does not have, such as {foreign[:5]}"
            )
        both = sorted(report.left_out.get((stage, epoch), set()) & ids.keys())
        if both:
            report.problems.append(f"{stage} epoch {epoch}: consumed and left out, such as {both[:5]}")
        first_epoch = min(each for other, each in epochs if other == stage)
        consumed_before = more.first[stage]["consumed"] if stage in more.first and epoch == first_epoch else 0
        due = per_epoch - consumed_before
        # By the number of rows where they may repeat, else by that of different ones.
        found = ids.total() if report.drawn else len(ids)
        if found + undecoded[stage, epoch] < due:
            text = f"{stage} epoch {epoch}: {found} of {due} samples"
            (report.problems if (stage, epoch + 1) in epochs else report.unfinished).append(text)
        if found > due:
            report.problems.append(
                f"{stage} epoch {epoch}: {found} samples, and drop_last leaves only {due}"
                if not report.drawn
                else f"{stage} epoch {epoch}: {found} samples, and {due} were drawn"
            )
    return report


def _not_as_drawn(stage: str, step: int, lines: list[dict[str, Any]], batch: Sequence[int]) -> list[str]:
    """Says how the samples of a step differ from those that were drawn for it; which rank had which does not matter."""
    consumed = Counter(number for line in lines for number in [*line["ids"], *line.get("left_out", [])])
    drawn = Counter(batch)
    if consumed == drawn:
        return []
    others, missing = list((consumed - drawn).elements()), list((drawn - consumed).elements())
    parts = [f"{len(others)} that were not drawn, such as {others[:5]}"] if others else []
    parts += [f"not {len(missing)} that were, such as {missing[:5]}"] if missing else []
    return [f"{stage} step {step}: it consumed {', and '.join(parts)}"]
