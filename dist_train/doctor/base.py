"""A check's input and output: lines that are good, a warning or bad; the last two say what to type."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from dist_train.errors import EXIT_DONE, EXIT_FAILED

Level = Literal["good", "warning", "bad"]


@dataclass(frozen=True)
class Line:
    """A line of a check. `exit_code` of a bad one: EXIT_CONFIG for a wrong configuration or environment."""

    level: Level
    text: str
    hint: str = ""
    exit_code: int = EXIT_DONE


def good(text: str) -> Line:
    return Line("good", text)


def warning(text: str, hint: str) -> Line:
    return Line("warning", text, hint)


def bad(text: str, hint: str, exit_code: int = EXIT_FAILED) -> Line:
    return Line("bad", text, hint, exit_code)


@dataclass(frozen=True)
class Subject:
    """Settings of the configuration that checks look at.

    Attributes:
        run_dir: the run directory, or its working copy.
        wanted: backend, formats, runtimes and trackers of the configuration: it is bad, not a warning, where they fail.
        device: run.device.
        workers: worker processes of a node that read data; 0 where they are not known.
        batch_bytes: bytes of a batch of one of them; 0 where they are not known.
        deep: True where each export format is tried, not only those that are wanted.
        store: the run's address at an object store; "" where it has none.
    """

    run_dir: str = "runs"
    wanted: tuple[str, ...] = ()
    device: str = "auto"
    workers: int = 0
    batch_bytes: int = 0
    deep: bool = False
    store: str = ""

    def lacking(self, name: str, text: str, hint: str) -> Line:
        """Returns a warning, or a bad line where the configuration asks for `name`."""
        return bad(text, hint) if name in self.wanted else warning(text, hint)

    def untried(self, name: str) -> Line | None:
        """Returns a line instead of a trial that takes long, where nobody asks for `name`."""
        if self.deep or name in self.wanted:
            return None
        return good(f"{name}: installed; dist-train doctor --deep tries it on a small model")


@dataclass(frozen=True)
class Section:
    name: str
    lines: tuple[Line, ...]

    def text(self) -> str:
        """Returns plain text, to paste into a message."""
        rows = [self.name]
        for line in self.lines:
            first, *more = line.text.splitlines() or [""]
            rows += [f"  {line.level:<7}  {first}", *(f"           {each.strip()}" for each in more)]
            rows += [f"           -> {line.hint}"] if line.hint else []
        return "\n".join(rows)


def exit_code(sections: Iterable[Section]) -> int:
    """Returns the worst line's exit code: EXIT_CONFIG before EXIT_FAILED, as running again does not help."""
    return max((line.exit_code for section in sections for line in section.lines), default=EXIT_DONE)


def summary(sections: Sequence[Section]) -> str:
    levels = [line.level for section in sections for line in section.lines]
    warnings = levels.count("warning")
    said = [f"{levels.count('bad')} bad"] if "bad" in levels else ["nothing bad"]
    said += [f"{warnings} warning" + ("" if warnings == 1 else "s")] if warnings else []
    return ", ".join(said)
