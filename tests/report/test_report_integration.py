"""A run that fails and is resumed: one run in each tracker, and details of each model for its report."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.report.write import write_report
from dist_train.run_dir.files import read_json
from dist_train.run_dir.paths import RunDir
from tests.pipeline.test_pipeline_integration import SMALL
from tests.support.ranks import train, train_done


@pytest.mark.slow
def test_trackers_and_details_of_a_resumed_run(tmp_path: Path) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(SMALL.replace("data:\n", f"data:\n  cache_dir: {tmp_path / 'cache'}\n"))
    run = RunDir(tmp_path / "run")
    command = ["run", str(config), "--run.dir", str(run.path), "--import", "tests.support.faulty_parts"]
    command += ["--qat.backend", "drifting", "--train.select", "best", "--trackers", "[jsonl, wandb, tensorboard]"]
    environ = {"WANDB_MODE": "offline"}
    with train(2, *command, environ=environ) as ranks:
        assert ranks.wait() == [1, 1], ranks.printed()
        assert "left out" not in ranks.output(0)
    first = {name: run.details(name).read_bytes() for name in ("fp32", "ptq", "fake_quant", "int8")}
    page = write_report([run.path]).read_text()
    assert "the gate `convert` failed" in page
    with train(2, *command, "--convert.agreement_bound", "0", environ=environ) as ranks:
        assert ranks.wait() == [0, 0], ranks.printed()
        assert "left out" not in ranks.output(0)
    models = read_json(run.results)["models"]
    assert set(models) == set(first)
    for name, figures in models.items():
        assert run.details(name).read_bytes() == first[name]
        details = read_json(run.details(name))
        matrix = details["metrics"]["confusion"]
        assert sum(map(sum, matrix)) == figures["count"] == 61
        assert sum(row[place] for place, row in enumerate(matrix)) / 61 == pytest.approx(figures["top1"])
        assert len(details["worst"]) == 16
    ids = {path.stem.removeprefix("run-") for path in run.wandb.glob("offline-run-*/*.wandb")}
    assert ids == {(run.wandb / "run_id").read_text()}
    assert len(list(run.wandb.glob("offline-run-*"))) == 2
    assert {entry.name for entry in run.tensorboard.iterdir()} == {"train", "qat"}
    assert "61" in write_report([run.path]).read_text()
    assert "this run is done" in train_done(1, *command, "--convert.agreement_bound", "0")
