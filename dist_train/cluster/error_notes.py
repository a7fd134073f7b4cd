"""Notes by which others learn of a rank's error: torchrun's agent, and ranks of the node that find the same one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from dist_train.cluster.rank_plan import place_of
from dist_train.errors import SetupError

_FILE = "TORCHELASTIC_ERROR_FILE"  # set by torchrun's agent; it shows what a rank that failed wrote there
_WAIT_SECONDS = 3.0  # how much later than another rank the first rank of a node may find a mistake
_OLD_SECONDS = 60.0  # a note of an earlier run
_POLL_SECONDS = 0.05
_STAMP = (  # of one run
    *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID"),
    *("SLURM_STEP_ID", "PMIX_NAMESPACE", "PMI_JOBID"),
)


def tell_agent(text: str, environ: Mapping[str, str], echo: bool = False) -> None:
    """Gives torchrun's agent the text to show in its table of failed ranks; a second text replaces the first.

    Args:
        echo: whether another rank is the cause: the agent takes the earliest error for it, by whole seconds.
    """
    path = environ.get(_FILE)
    if not path:
        return
    when = int(time.time()) + int(echo)
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        when = int(json.loads(Path(path).read_text())["message"]["extraInfo"]["timestamp"])
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": {"timestamp": str(when)}}}))


def show_once(text: str, environ: Mapping[str, str], show: Callable[[], None]) -> None:
    """Calls `show` for the error `text` on one of the ranks of this node that find it.

    They cannot speak to each other yet. The first rank of the node shows what it finds at once, and leaves a note. The
    others wait for a note; if there is none, one of them shows the error.
    """
    try:
        plan = place_of(environ)
    except SetupError:
        return show()
    if plan.local_world_size == 1:
        return show()
    stamp = [text, str(os.getuid()), *(str(environ.get(name)) for name in _STAMP)]
    digest = hashlib.sha256("\n".join(stamp).encode(errors="backslashreplace")).hexdigest()
    note = Path(tempfile.gettempdir()) / f"dist-train-said-{digest[:20]}"
    if plan.local_rank == 0:
        show()
        with contextlib.suppress(OSError):
            # In one piece: one that is still empty would be taken for an earlier run's, and removed.
            whole = note.with_name(f"{note.name}-{os.getpid()}")
            whole.write_text(str(plan.rank))
            whole.replace(note)
        return None
    if not _left_by_another(note, plan.rank):
        with contextlib.suppress(OSError):
            note.unlink(missing_ok=True)  # of an earlier run
    until = time.monotonic() + _WAIT_SECONDS
    while time.monotonic() < until:
        if _left_by_another(note, plan.rank):
            return None
        time.sleep(_POLL_SECONDS)
    try:
        with note.open("x") as file:
            file.write(str(plan.rank))
    except OSError:
        if _left_by_another(note, plan.rank):
            return None
    return show()


def _left_by_another(note: Path, rank: int) -> bool:
    """Tells whether there is a new note of another rank: one of the same rank is of an earlier run."""
    try:
        return time.time() - note.stat().st_mtime < _OLD_SECONDS and note.read_text() not in ("", str(rank))
    except OSError:
        return False
