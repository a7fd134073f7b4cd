"""A run goes on with the steps of activations of its first start, on whatever CPU that is."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.run_dir.files import read_json
from dist_train.run_dir.paths import RunDir
from tests.support.small_runs import Runs

pytestmark = pytest.mark.heavy
SETTINGS = [
    "--stages",
    "[train, qat, convert]",
    "--train.epochs",
    "1",
    "--qat.epochs",
    "1",
    "--convert.runtime",
    "none",
]
SETTINGS += ["--checkpoint.every_steps", "2", "--task.name", "interruptible"]


@pytest.mark.slow
def test_a_run_that_moves_to_another_cpu_keeps_its_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(tmp_path)

    def cpu(overflows: bool) -> None:
        for module in ("auto", "set_up"):
            monkeypatch.setattr(f"dist_train.pipeline.{module}.sums_overflow", lambda: overflows)

    cpu(overflows=False)
    assert runs("wide", *SETTINGS) == 0
    cpu(overflows=True)
    assert runs("narrow", *SETTINGS) == 0
    assert runs("moved", *SETTINGS, interrupt_at=20) == -1
    assert runs.checkpoints("moved").latest is not None and "qat" in str(runs.checkpoints("moved").latest)
    cpu(overflows=False)
    assert runs("moved", *SETTINGS) == 0
    found = {name: read_json(RunDir(tmp_path / name).environment)["qat_engine"] for name in ("wide", "narrow", "moved")}
    assert found == {"wide": "auto", "narrow": "x86", "moved": "x86"}
    assert runs.product("moved", "qat") == runs.product("narrow", "qat") != runs.product("wide", "qat")
