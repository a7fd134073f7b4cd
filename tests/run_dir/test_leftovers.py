"""Temporary files of killed writers are removed, those of living ones and of others are not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_train.run_dir.leftovers import beside, remove_leftovers
from tests.support.ranks import ROOT

WRITER = """
import sys
from pathlib import Path
from dist_train.run_dir.files import replace_file
with replace_file(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.mark.timeout(60)
def test_only_what_a_dead_writer_left_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "images.npy"
    command = [sys.executable, "-c", WRITER, str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None and process.stdout.readline() == b"writing\n"
        (temporary,) = tmp_path.iterdir()
        remove_leftovers(tmp_path)
        assert temporary.exists(), "its writer lives"
        process.kill()
        process.wait()
        remove_leftovers(tmp_path, tmp_path / "not there")
        assert not temporary.exists() and not path.exists()


def test_a_process_of_another_start_with_the_same_number_is_not_the_writer(tmp_path: Path) -> None:
    own = beside(tmp_path / "a")
    machine, pid, started = own.name.split(".")[2].split("-")
    other = own.with_name(own.name.replace(f"{pid}-{started}", f"{pid}-{int(started) + 1}"))
    own.mkdir()
    other.mkdir()
    (other / "tensors").touch()
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [own] and machine


@pytest.mark.parametrize("name", [".a.0123abcd-1-2.0123abcd.tmp", ".a.0123456789abcdef0123456789abcdef.tmp"])
def test_what_another_machine_may_write_stays_for_a_day(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    (tmp_path / ".a.npy").touch()
    (tmp_path / "a.tmp").touch()
    remove_leftovers(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    for path in list(tmp_path.iterdir()):
        os.utime(path, (0, 0))
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.npy", "a.tmp"]
