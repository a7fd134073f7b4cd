"""Whole runs, train to export, under faults that a seed draws; prints the line that repeats a failure.

    python -m tests.chaos --seed 0 --minutes 20 [--only RUN] [--folder DIR]

Each run is started again and again, on one to three ranks, until it is done. While it is at work, ranks are killed or
asked to stop, a process is suspended, or a second start is tried. Between two starts the newest checkpoint or another
file of the run is damaged. A run that keeps its world size must end with the bytes of an undisturbed one; one whose
world size changes, with a perfect ledger and passed gates. No output may hold a traceback, and damage may cost one
checkpoint interval at most.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dist_train.errors import RunDirError
from dist_train.run_dir.files import read_json
from dist_train.run_dir.ledger import check
from dist_train.run_dir.paths import RunDir
from dist_train.run_dir.saved import newest_first
from tests.pipeline.test_exactness_integration import CONFIG, assert_same_result, command, lines
from tests.pipeline.test_recovery import ALL, MANIFEST, TENSORS, TREE
from tests.support.ranks import Ranks, train, train_done

INTERVAL = 4  # checkpoint.every_steps of CONFIG
WORLD_SIZES = (1, 2, 3)
MOST_FAULTS = 5
_DONE_AGAIN = re.compile(r"(\d+) steps? of \w+ (?:is|are) done again")
_RESUMABLE = 75


class Disturbed:
    """A run and what was done to it.

    Attributes:
        told: each fault, for the report of a failure.
    """

    def __init__(self, config: Path, run_dir: Path, draw: random.Random) -> None:
        self.words, self.dir, self.draw = command(config, run_dir), RunDir(run_dir), draw
        self.told: list[str] = []
        self._damaged_since = ""

    @property
    def done(self) -> bool:
        with contextlib.suppress(RunDirError):  # it was damaged, and is rebuilt by the next start
            return (read_json(self.dir.status) or {}).get("state") == "done"
        return False

    def start(self, world_size: int, total: int) -> None:
        """Starts the run, disturbs it at a drawn moment, and checks how it ends."""
        fault = self.draw.choice(FAULTS)
        goal = lines(self.dir.path) + self.draw.uniform(0.05, 0.5) * total
        with train(world_size, *self.words) as ranks:
            self._say(f"{world_size} ranks, {fault.__name__} after {goal:.0f} lines of metrics")
            ranks.until(lambda: lines(self.dir.path) >= goal)
            time.sleep(self.draw.uniform(0, 0.3))
            fault(self, ranks)
            codes, printed = ranks.wait(), ranks.printed()
        self._say(f"exit codes {codes}")
        assert "Traceback" not in printed, printed
        assert all(int(count) <= INTERVAL for count in _DONE_AGAIN.findall(printed)), printed
        if 0 in codes:
            assert codes == [0] * world_size and self.done, printed

    def damage(self) -> None:
        """Damages a file of the run, if it is not done and something whole is left to go on from."""
        if self.done or not self.draw.randrange(2):
            return
        damage = self.draw.choice(ALL)
        names = [name for name in newest_first(self.dir.checkpoints) if not name.startswith("damaged")]
        files = [self.dir.status, self.dir.environment, self.dir.config, self.dir.checkpoints / "latest.json"]
        file = self.draw.choice(files)
        # Two checkpoints are kept, so that damage to the newest costs one interval; a second needs new ones.
        if len(names) > 1 and names[0] > self._damaged_since and self.draw.randrange(2):
            self._damaged_since = names[0]
            file = self.dir.checkpoints / names[0] / self.draw.choice([TENSORS, TREE, MANIFEST])
        if file.exists() and file.stat().st_size:
            damage(file)
            self._say(f"{file.relative_to(self.dir.path)} {damage.__name__}")

    def finish(self, world_size: int) -> None:
        printed = train_done(world_size, *self.words)
        assert all(int(count) <= INTERVAL for count in _DONE_AGAIN.findall(printed)), printed
        self._say(f"finished by {world_size} ranks")

    def _say(self, text: str) -> None:
        self.told.append(text)


def nothing(run: Disturbed, ranks: Ranks) -> None:
    """Lets the ranks go on to the end."""


def kill_one(run: Disturbed, ranks: Ranks) -> None:
    ranks.kill([run.draw.randrange(len(ranks.processes))])


def kill_all(run: Disturbed, ranks: Ranks) -> None:
    ranks.kill()


def signal_one(run: Disturbed, ranks: Ranks) -> None:
    rank, number = run.draw.randrange(len(ranks.processes)), run.draw.choice([signal.SIGTERM, signal.SIGUSR2])
    with contextlib.suppress(ProcessLookupError):
        os.kill(ranks.processes[rank].pid, number)
    assert set(ranks.wait()) <= {0, _RESUMABLE}, ranks.printed()


def stop_file(run: Disturbed, ranks: Ranks) -> None:
    run.dir.stop.touch()
    assert set(ranks.wait()) <= {0, _RESUMABLE}, ranks.printed()
    run.dir.stop.unlink(missing_ok=True)  # the run was done before it saw the file


def suspend_one(run: Disturbed, ranks: Ranks) -> None:
    """Suspends a rank for longer than a step; nothing may come of it."""
    process = ranks.processes[run.draw.randrange(len(ranks.processes))]
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(1.0)
        os.kill(process.pid, signal.SIGCONT)
    assert set(ranks.wait()) == {0}, ranks.printed()


def second_start(run: Disturbed, ranks: Ranks) -> None:
    """Starts the same command beside the run: refused, or, once the run is done, shown its results."""
    with train(1, *run.words, "--train.optim.lr", "0.01") as second:
        (code,) = second.wait()
        assert code in (1, 78), second.printed()
    assert set(ranks.wait()) == {0}, ranks.printed()


FAULTS: tuple[Callable[[Disturbed, Ranks], None], ...] = (
    *(nothing, kill_one, kill_one, kill_all, kill_all),
    *(signal_one, signal_one, stop_file, suspend_one, second_start),
)


class Chaos:
    def __init__(self, seed: int, folder: Path) -> None:
        self.seed, self.folder = seed, folder
        self.config = folder / "exact.yaml"
        self.config.write_text(CONFIG.replace("data:\n", f"data:\n  cache_dir: {folder / 'cache'}\n"))
        self._undisturbed: dict[int, Path] = {}

    def undisturbed(self, world_size: int) -> Path:
        if world_size not in self._undisturbed:
            run_dir = self.folder / f"undisturbed-{world_size}"
            train_done(world_size, *command(self.config, run_dir))
            self._undisturbed[world_size] = run_dir
        return self._undisturbed[world_size]

    def run(self, number: int) -> str:
        """Takes one run through its faults to the end; returns a line about it.

        Raises:
            AssertionError: a promise was broken; with all that was done, and the command that repeats it.
        """
        draw = random.Random(f"{self.seed}/{number}")
        kept = draw.choice([None, *WORLD_SIZES])
        total = lines(self.undisturbed(kept or 1))
        run = Disturbed(self.config, self.folder / f"run-{number}", draw)
        try:
            for _ in range(draw.randint(1, MOST_FAULTS)):
                run.start(kept or draw.choice(WORLD_SIZES), total)
                if run.done:
                    break
                run.damage()
            run.finish(kept or draw.choice(WORLD_SIZES))
            self._judge(run, kept)
        except AssertionError as error:
            again = f"python -m tests.chaos --seed {self.seed} --only {number}"
            raise AssertionError("\n".join([str(error), *run.told, f"repeat it: {again}"])) from error
        shutil.rmtree(run.dir.path)
        return f"run {number}: {'; '.join(run.told)}"

    def _judge(self, run: Disturbed, kept: int | None) -> None:
        found = check(run.dir.path)
        assert found.ok, str(found)
        gates = read_json(run.dir.results)["gates"]
        assert gates and all(gate["passed"] for gate in gates.values()), gates
        for damaged in run.dir.checkpoints.glob("damaged-*"):
            shutil.rmtree(damaged)  # kept for the user; no part of the comparison
        if kept is not None:
            assert_same_result(self.undisturbed(kept), run.dir.path)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=20.0, help="no run begins after as many minutes")
    parser.add_argument("--only", type=int, metavar="RUN", help="this run alone")
    parser.add_argument("--folder", type=Path, help="kept, with the run that failed; default: a temporary one")
    given = parser.parse_args(words)
    with contextlib.ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        chaos, began, number = Chaos(given.seed, folder.resolve()), time.monotonic(), 0
        if given.only is not None:
            print(chaos.run(given.only), flush=True)
            return 0
        while time.monotonic() - began < given.minutes * 60:
            print(chaos.run(number), flush=True)
            number += 1
        print(f"seed {given.seed}: {number} runs in {(time.monotonic() - began) / 60:.0f} minutes, all as promised")
    return 0


if __name__ == "__main__":
    sys.exit(main())
