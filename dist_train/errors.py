"""Errors that a user may see: they name the mistake, its place, and what to type."""

from __future__ import annotations

import difflib
import re
import sysconfig
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again
EXIT_CONFIG = 78  # EX_CONFIG of sysexits.h: running it again will not help

_ALIKE = 0.5  # difflib's ratio from which a name is taken for a misspelling of another


def nearest(word: str, names: Iterable[str], count: int = 2) -> list[str]:
    """Returns at most `count` of `names` that `word` may be a misspelling of, the nearest first."""
    return difflib.get_close_matches(word, list(names), n=count, cutoff=_ALIKE)


def did_you_mean(word: str, names: Iterable[str], count: int = 2, before: str = "") -> str:
    """Returns "did you mean a or b?" of the nearest `names`, each after `before`; "" where none is near."""
    return ask_for([before + name for name in nearest(word, names, count)])


def ask_for(names: Sequence[str]) -> str:
    """Returns "did you mean a or b?"; "" for no names."""
    return f"did you mean {' or '.join(names)}?" if names else ""


def first_line(error: BaseException | str) -> str:
    """Returns the first line of an error's text that is not empty, or the name of its type if there is no text."""
    try:
        lines = str(error).splitlines()
    except Exception:  # another's error may fail at this, too
        lines = []
    return next((line.strip() for line in lines if line.strip()), type(error).__name__)


def told(error: BaseException) -> str:
    """Returns another's error in a line: its type, the first line of its text, and the line of code that led to it."""
    kind, text, place = type(error).__name__, first_line(error), _raised_at(error)
    return (kind if text == kind else f"{kind}: {text}") + (f" ({place})" if place else "")


def _raised_at(error: BaseException) -> str:
    """Returns "file:line" of the innermost code that is neither ours nor installed, else of the innermost code."""
    frames = [(code.co_filename, line) for code, line in _lines_of(error) if not code.co_filename.startswith("<")]
    folders = (str(Path(__file__).parent), *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))
    own = [frame for frame in frames if not frame[0].startswith(folders)]
    ours = [frame for frame in frames if not frame[0].startswith(folders[0])]
    file, line = (own or ours or [("", 0)])[-1]
    return f"{file}:{line}" if file else ""


def _lines_of(error: BaseException) -> list[tuple[CodeType, int]]:
    return [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]


def escaped(name: str) -> str:
    """Returns a name of a file or folder as UTF-8 can write it: bytes that are no UTF-8 become \\xNN."""
    bytes_escaped = re.sub("[\udc80-\udcff]", lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", name)
    return bytes_escaped.encode(errors="backslashreplace").decode()


class DistTrainError(Exception):
    """Base of the errors that are shown without a traceback.

    `message` says what is wrong and where; `hint` says what to type. Names that are no UTF-8 are escaped in both.

    Attributes:
        kept_in: file with the traceback of the first cause; "" for none.
    """

    exit_code = EXIT_FAILED
    kept_in: str = ""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(escaped(message))
        self.message = escaped(message)
        self.hint = escaped(hint)

    def __str__(self) -> str:
        lines = [self.message]
        lines += [f"  -> {self.hint}"] if self.hint else []
        lines += [f"  traceback: {self.kept_in}"] if self.kept_in else []
        return "\n".join(lines)


@dataclass(frozen=True)
class Problem:
    """One mistake in the configuration: `place` is a dotted key, `source` is a file and line or an option."""

    place: str
    message: str
    source: str = ""
    hint: str = ""

    def __str__(self) -> str:
        where = f"{self.place} ({self.source})" if self.source else self.place
        return f"{where}: {self.message}" + (f"\n      -> {self.hint}" if self.hint else "")


class ConfigError(DistTrainError):
    """All mistakes of a configuration at once."""

    exit_code = EXIT_CONFIG

    def __init__(self, problems: Sequence[Problem], hint: str = "") -> None:
        self.problems = tuple(problems)
        count = "1 mistake" if len(self.problems) == 1 else f"{len(self.problems)} mistakes"
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{count} in the configuration:\n{lines}", hint)


class UsageError(DistTrainError):
    """The command line cannot be read: an unknown command, or arguments that it does not take."""

    exit_code = EXIT_CONFIG


class SetupError(DistTrainError):
    """The environment contradicts itself or lacks something: ranks, devices, libraries, versions."""

    exit_code = EXIT_CONFIG


class RunDirError(DistTrainError):
    """The run directory belongs to another run, or cannot be used."""

    exit_code = EXIT_CONFIG


class DataError(DistTrainError):
    """A dataset is missing, corrupt or not what the model expects."""


class ModelError(DataError):
    """A model does not take the inputs, or return the outputs, that data and task need."""

    exit_code = EXIT_CONFIG


class CorruptSampleError(DataError):
    """An item of a dataset that cannot be decoded; `data.on_corrupt: skip` leaves it out."""


class CheckpointError(DistTrainError):
    """A checkpoint is damaged or does not fit."""


class ArtifactError(DistTrainError):
    """An exported artifact is damaged, incomplete or from an unsupported version."""


class QuantizationError(DistTrainError):
    """A model cannot be quantized this way; the hint says what to change."""


class BackendVersionError(QuantizationError):
    """The quantization backend does not go with the installed torch or torchao."""

    exit_code = EXIT_CONFIG


class GateError(DistTrainError):
    """A measured value lies outside its gate's bound: the result must not be trusted."""


class NonFiniteLossError(DistTrainError):
    """The loss became NaN or infinite; names step and ranks."""


class StuckError(DistTrainError):
    """A rank made no progress for `watchdog.timeout`; names rank and phase."""


class Preempted(DistTrainError):
    """The run stopped on request, and can be resumed. Nothing is wrong."""

    exit_code = EXIT_PREEMPTED


class PeerError(DistTrainError):
    """Another rank failed, or did not answer in time. It is never the cause itself."""
