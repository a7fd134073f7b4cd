"""What a check is given, and what it says: lines that are good, a warning or bad, the last two with what to type."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from dist_train.errors import EXIT_DONE, EXIT_FAILED

Level = Literal["good", "warning", "bad"]


@dataclass(frozen=True)
class Line:
    """`exit_code`: of a bad line; EXIT_CONFIG where the configuration or the environment's variables are what is wrong."""

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
    """What is looked at besides the machine.

    Attributes:
        run_dir: where the run would write.
        wanted: the backend and the formats that the configuration asks for: what is otherwise a warning is bad for these.
        device: run.device.
    """

    run_dir: str = "runs"
    wanted: tuple[str, ...] = ()
    device: str = "auto"

    def lacking(self, name: str, text: str, hint: str) -> Line:
        """A warning, or a bad line where the configuration asks for `name`."""
        return bad(text, hint) if name in self.wanted else warning(text, hint)


@dataclass(frozen=True)
class Section:
    name: str
    lines: tuple[Line, ...]

    def text(self) -> str:
        """Plain text, to paste into a message."""
        rows = [self.name]
        for line in self.lines:
            first, *more = line.text.splitlines() or [""]
            rows += [f"  {line.level:<7}  {first}", *(f"           {each.strip()}" for each in more)]
            rows += [f"           -> {line.hint}"] if line.hint else []
        return "\n".join(rows)


def exit_code(sections: Iterable[Section]) -> int:
    """The worst line's: EXIT_CONFIG is worse than EXIT_FAILED, as running again helps less."""
    return max((line.exit_code for section in sections for line in section.lines), default=EXIT_DONE)


def summary(sections: Sequence[Section]) -> str:
    levels = [line.level for section in sections for line in section.lines]
    warnings = levels.count("warning")
    said = [f"{levels.count('bad')} bad"] if "bad" in levels else ["nothing bad"]
    said += [f"{warnings} warning" + ("" if warnings == 1 else "s")] if warnings else []
    return ", ".join(said)
