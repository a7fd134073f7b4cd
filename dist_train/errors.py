"""Errors that a user may see: they name the mistake, its place, and what to type."""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again
EXIT_INTERRUPTED = 130  # what a shell reports for SIGINT
EXIT_CONFIG = 78  # EX_CONFIG of sysexits.h: running it again will not help

# By these Python ends a program or a generator. Other code may raise any other BaseException: SystemExit, its own.
STOPS = (KeyboardInterrupt, GeneratorExit)

# Packages whose frames say less about a user's error than the frame that called them.
_LIBRARIES = {"accelerate", "click", "numpy", "PIL", "pydantic", "pydantic_core", "safetensors", "torch", "torchao"}
_LIBRARIES |= {"torchmetrics", "torchvision"}
_CONTROLS = re.compile(r"[\t\n]")
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_SHOWN = 50  # mistakes of a configuration
_ALIKE = 0.5  # difflib's ratio from which a name is taken for a misspelling of another


def nearest(word: str, names: Iterable[str], count: int = 2) -> list[str]:
    """Returns at most `count` of `names` that `word` may be a misspelling of, the nearest first."""
    return difflib.get_close_matches(word, list(names), n=count, cutoff=_ALIKE)


def likeness(word: str, name: str) -> float:
    """Returns difflib's ratio of two names: 1 for equal ones."""
    return difflib.SequenceMatcher(None, name, word).ratio()


def did_you_mean(word: str, names: Iterable[str], count: int = 2, before: str = "") -> str:
    """Returns "did you mean a or b?" of the nearest `names`, each after `before`; "" where none is near."""
    return ask_for([before + name for name in nearest(word, names, count)])


def ask_for(names: Sequence[str]) -> str:
    """Returns "did you mean a or b?"; "" for no names."""
    return f"did you mean {' or '.join(names)}?" if names else ""


def text_of(error: BaseException | str) -> str:
    """Returns an error's text; "" for an exception of other code whose `__str__` fails."""
    try:
        return str(error)
    except Exception:
        return ""


def first_line(error: BaseException | str) -> str:
    """Returns the first line of an error's text that is not empty, or the name of its type if there is no text."""
    lines = (line.strip() for line in text_of(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def told(error: BaseException, ours: bool = True) -> str:
    """Returns an error of other code in a line: its type, the first line of its text, and the line that raised it.

    ours: whether to name a line of dist_train, where none of the user's code has a part in the error.
    """
    kind, text, (place, own) = type(error).__name__, first_line(error), _place(error)
    place = "" if own and not ours else place
    return (kind if text == kind else f"{kind}: {text}") + (f" ({place})" if place else "")


def escaped(name: str) -> str:
    """Returns a name of a file, folder or class on one line: `printable`, with codes for tabs and line ends too."""
    return _CONTROLS.sub(_as_code, printable(name))


def printable(text: str) -> str:
    """Returns a text that a terminal and a page show as it is: its bytes that are no UTF-8 become \\xNN.

    So do the characters that move a cursor, change colours or turn the direction of writing, but for tabs and ends of
    lines.
    """
    bytes_escaped = re.sub("[\udc80-\udcff]", lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", text)
    return _UNSEEN.sub(_as_code, bytes_escaped).encode(errors="backslashreplace").decode()


def _as_code(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def csv_cell(text: str) -> str:
    """Returns a text as a cell of CSV that a spreadsheet shows, and does not compute: `'=1+1`."""
    text = escaped(text)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class DistTrainError(Exception):
    """Base of the errors that are shown without a traceback.

    `message` says what is wrong and where; `hint` says what to type. Both are `printable`.

    Attributes:
        kept_in: file with the traceback of the error and its causes; "" for none.
    """

    exit_code = EXIT_FAILED
    kept_in = ""

    def __init__(self, message: str, hint: str = "") -> None:
        self.message, self.hint = printable(message), printable(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        lines = [self.message]
        lines += [f"  -> {self.hint}"] if self.hint else []
        lines += [f"  traceback: {self.kept_in}"] if self.kept_in else []
        return "\n".join(lines)


@dataclass(frozen=True)
class Problem:
    """One mistake in the configuration: `place` is a dotted key, `source` is a file and line or an option.

    `cause` is the error of other code that showed it. `here` tells that it is of this machine alone, which lacks a file
    or a package.
    """

    place: str
    message: str
    source: str = ""
    hint: str = ""
    cause: BaseException | None = field(default=None, compare=False, repr=False)
    here: bool = field(default=False, compare=False, repr=False)

    def __str__(self) -> str:
        where = f"{self.place} ({self.source})" if self.source else self.place
        return f"{where}: {self.message}" + (f"\n      -> {self.hint}" if self.hint else "")


class ConfigError(DistTrainError):
    """All mistakes of a configuration at once."""

    exit_code = EXIT_CONFIG

    def __init__(self, problems: Sequence[Problem], hint: str = "") -> None:
        self.problems = tuple(problems)
        count = "1 mistake" if len(self.problems) == 1 else f"{len(self.problems)} mistakes"
        lines = "\n".join(f"  - {problem}" for problem in self.problems[:_SHOWN])
        if len(self.problems) > _SHOWN:
            lines += f"\n  and {len(self.problems) - _SHOWN} more"
        super().__init__(f"{count} in the configuration:\n{lines}", hint)
        self.__cause__ = next(filter(None, (problem.cause for problem in self.problems)), None)


class UsageError(DistTrainError):
    """The command line cannot be read: an unknown command, or arguments that it does not take."""

    exit_code = EXIT_CONFIG


class SetupError(DistTrainError):
    """The environment contradicts itself or lacks something: ranks, devices, libraries, versions."""

    exit_code = EXIT_CONFIG


class RunDirError(DistTrainError):
    """The run directory belongs to another run, or cannot be used."""

    exit_code = EXIT_CONFIG


class RunDirBusyError(RunDirError):
    """Another run uses the run directory; the same command works after its end."""

    exit_code = EXIT_FAILED


class StoreError(DistTrainError):
    """An object store does not do what it is asked: no network, no such bucket, no right to it."""


class DataError(DistTrainError):
    """A dataset is missing, corrupt or not what the model expects."""


class ModelError(DataError):
    """A model does not take the inputs, or return the outputs, that data and task need."""

    exit_code = EXIT_CONFIG


class CorruptSampleError(DataError):
    """An item of a dataset that cannot be decoded; `data.on_corrupt: skip` leaves it out."""


class CheckpointError(DistTrainError):
    """A checkpoint is damaged or does not fit."""


class DamagedCheckpointError(CheckpointError):
    """A file of a checkpoint is missing, or is not what was written; an older checkpoint may be whole."""


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


class RankEndedError(DistTrainError):
    """A rank's process is gone, and said nothing; names rank and phase."""


class Preempted(DistTrainError):
    """The run stopped on request, and can be resumed. Nothing is wrong."""

    exit_code = EXIT_PREEMPTED


class NodeLeft(Preempted):
    """The run stopped because another node leaves. The agent of this rank meets the others again, and goes on."""


class PeerError(DistTrainError):
    """Another rank failed, or did not answer in time. It is never the cause itself."""


class ForeignError(DistTrainError):
    """An error of code that is not ours, or a fault of ours: `message` has its type, text and place.

    The error itself is the `__cause__`.
    """


def in_words(error: BaseException) -> BaseException:
    """Returns the ForeignError that stands for an error of other code, with that error as its cause.

    Our own errors and KeyboardInterrupt are returned as they are.
    """
    if isinstance(error, (DistTrainError, *STOPS)):
        return error
    found = ForeignError(told(error), advice(error, _place(error)[1]))
    found.__cause__ = error
    return found


def keep_traceback(error: BaseException, path: str | os.PathLike[str]) -> None:
    """Writes the traceback of an error and its causes to `path` and notes the path in the error.

    Writes nothing for an error of ours without a cause, whose message says all, and where the disk takes nothing.
    """
    if not isinstance(error, DistTrainError) or error.__cause__ is None:
        return
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(traceback.format_exception(error))
    except OSError:
        return
    error.kept_in = os.fspath(path)


def _place(error: BaseException) -> tuple[str, bool]:
    """Returns file and line of the innermost frame of the user's code, else of ours; True if the user's is in none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}", False
    frames = [(_owner(each.filename), each) for each in traceback.extract_tb(error.__traceback__)]
    for owner in ("user", "dist_train"):
        for found, frame in reversed(frames):
            if found == owner:
                return f"{frame.filename}:{frame.lineno}", owner == "dist_train"
    return "", True


def _owner(filename: str) -> str:
    """Returns "dist_train", "library" or "user" (a package of site-packages that is not among `_LIBRARIES`, too)."""
    path = os.path.abspath(filename)
    if filename.startswith("<") or path.startswith(os.path.dirname(sys.executable) + os.sep):
        return "library"
    if path.startswith(os.path.dirname(os.path.abspath(__file__)) + os.sep):
        return "dist_train"
    for name in ("purelib", "platlib", "stdlib", "platstdlib"):  # site-packages lie in the standard library's folder
        folder = sysconfig.get_path(name) + os.sep
        if path.startswith(folder):
            package = path[len(folder) :].partition(os.sep)[0]
            return "library" if name.endswith("stdlib") or package in _LIBRARIES else "user"
    return "user"


def _lacks_memory(error: BaseException) -> bool:
    """Tells whether memory ran out; torch says so of a CPU's in a RuntimeError."""
    refused = isinstance(error, RuntimeError) and "can't allocate memory" in first_line(error)
    return refused or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def advice(error: BaseException, own: bool = False) -> str:
    """Returns what to do about an error of other code; "" if only its author knows. own: no user's code raised it."""
    if isinstance(error, SystemExit):
        return "the run was not done: raise an error that says why, in place of exit()"
    if _lacks_memory(error):
        return "less memory: --data.micro_batch_size SMALLER, --data.workers 0; the same command goes on"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "make room on that disk; the same command goes on from the last checkpoint"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "write to a folder of your own: --run.dir DIR, --data.cache_dir DIR"
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        return "raise the limit of open files: ulimit -n 65536"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"pip install {error.name.partition('.')[0]}, or whatever package has that module"
    if own and not isinstance(error, OSError):
        return "this may be a fault of dist_train: please report it, with the traceback"
    return ""
