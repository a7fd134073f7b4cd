"""Errors are told to torchrun's agent, and shown by one rank of those that find them."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dist_train.cluster.error_notes import show_once, tell_agent
from dist_train.distributed.polling import attempts

FIND = """
import json, os, sys, time
from dist_train.cluster import error_notes
open(os.path.join(os.environ["TMPDIR"], "ready-" + os.environ["RANK"]), "w").close()
while not os.path.exists(os.path.join(os.environ["TMPDIR"], "go")):
    time.sleep(0.01)
error_notes.show_once(sys.argv[1], os.environ, lambda: print("shown"))
"""


def variables(rank: int, port: int = 29500, **more: str) -> dict[str, str]:
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3, "MASTER_PORT": port}
    return {name: str(value) for name, value in given.items()} | {"MASTER_ADDR": "127.0.0.1"} | more


def showing(found: dict[int, str], folder: Path) -> list[int]:
    """Returns the ranks that show, of those that find a text."""
    (folder / "go").unlink(missing_ok=True)
    processes = {
        rank: subprocess.Popen(
            [sys.executable, "-c", FIND, text],
            env=variables(rank, PYTHONPATH=str(Path(__file__).parents[2]), TMPDIR=str(folder)),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, text in found.items()
    }
    # They find it together, however slowly they start.
    for _ in attempts(60):
        if len(list(folder.glob("ready-*"))) == len(found):
            break
    for file in folder.glob("ready-*"):
        file.unlink()
    (folder / "go").touch()
    return [rank for rank, process in processes.items() if process.communicate(timeout=60)[0] == "shown\n"]


@pytest.mark.parametrize(
    ("found", "ranks"),
    [
        ({0: "one", 1: "one", 2: "one"}, [0]),
        ({0: "one", 1: "two"}, [0, 1]),
        ({1: "one"}, [1]),
        ({0: "one", 1: "one", 2: "two"}, [0, 2]),
    ],
)
def test_each_error_is_shown_by_one_rank(found: dict[int, str], ranks: list[int], tmp_path: Path) -> None:
    assert showing(found, tmp_path) == ranks
    assert showing(found, tmp_path) == ranks, "again, right after it"


def test_of_ranks_that_the_first_is_not_among_one_shows(tmp_path: Path) -> None:
    assert len(showing({1: "one", 2: "one"}, tmp_path)) == 1


def test_where_no_note_can_be_left_every_rank_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    monkeypatch.setattr("dist_train.cluster.error_notes._WAIT_SECONDS", 0.0)
    shown: list[int] = []
    for rank in (0, 1):
        show_once("one", variables(rank), lambda rank=rank: shown.append(rank))
    assert shown == [0, 1]


def test_the_agents_table_has_the_text_in_place_of_its_advice(tmp_path: Path) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    files = [str(tmp_path / f"{rank}.json") for rank in (0, 1)]
    tell_agent("dist-train: rank 1 failed: planted", {"TORCHELASTIC_ERROR_FILE": files[0]}, echo=True)
    tell_agent("dist-train: planted", {"TORCHELASTIC_ERROR_FILE": files[1]})
    tell_agent("dist-train: planted\n  -> type this", {"TORCHELASTIC_ERROR_FILE": files[1]})
    error = ChildFailedError("run", {rank: ProcessFailure(rank, 1, 1, files[rank]) for rank in (0, 1)})
    cause = str(error).partition("Root Cause")[2]
    assert "rank      : 1" in cause and "traceback : dist-train: planted\n    -> type this" in cause
    assert "To enable traceback" not in str(error)


def test_a_second_text_keeps_the_time_of_the_first(tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    file.write_text(json.dumps({"message": {"message": "first", "extraInfo": {"timestamp": "7"}}}))
    tell_agent("second", {"TORCHELASTIC_ERROR_FILE": str(file)})
    assert json.loads(file.read_text())["message"] == {"message": "second", "extraInfo": {"timestamp": "7"}}
