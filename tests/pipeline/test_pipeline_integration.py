"""Runs that fail, change their number of ranks, or get another run's directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.files import read_json
from dist_train.run_dir.ledger import check, read_steps
from dist_train.run_dir.paths import RunDir
from tests.support.ranks import train, train_done
from tests.support.small_runs import run_here

SMALL = """
run: {name: small, threads_per_rank: 1, device: cpu}
data:
  name: fake
  args: {num_train: 203, num_eval: 61, num_classes: 6, channels: 1, height: 8, width: 8}
  global_batch_size: 20
model: {name: mlp, args: {size: 8, hidden: 32}}
train: {epochs: 3, optim: {lr: 0.02}}
ptq: {samples: 64}
convert: {runtime: none}
qat: {epochs: 1}
export: {latency: false}
debug: {ledger: true}
"""


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL.replace("data:\n", f"data:\n  cache_dir: {tmp_path / 'cache'}\n"))
    return ["run", str(path), "--run.dir", str(tmp_path / "run")]


@pytest.mark.slow
def test_a_failing_conversion_ends_every_rank_with_its_error(small: list[str], tmp_path: Path) -> None:
    with train(3, *small, "--import", "tests.support.faulty_parts", "--qat.backend", "refusing") as ranks:
        codes = ranks.wait()
        assert all(code == 1 for code in codes), ranks.printed()
        assert "layer conv7 cannot be converted" in ranks.output(0)
        assert "skip it by a rule" in ranks.output(0)
        for rank in (1, 2):
            assert "rank 0 failed" in ranks.output(rank)
            assert "conv7" in ranks.output(rank)
            assert "Traceback" not in ranks.output(rank)
    status = read_json(RunDir(tmp_path / "run").status)
    assert (status["state"], status["stage"]) == ("failed", "convert")
    assert "conv7" in status["error"]
    assert not (tmp_path / "run" / "export").exists()


@pytest.mark.slow
def test_a_conversion_past_its_deadline_is_not_waited_for(small: list[str], tmp_path: Path) -> None:
    settings = ["--import", "tests.support.faulty_parts", "--qat.backend", "endless", "--convert.deadline", "3"]
    with train(2, *small, *settings) as ranks:
        assert ranks.processes[1].wait(120) == 1, ranks.printed()
        assert "rank 0 did not finish (converting to int8) within 3 s" in ranks.output(1)
        assert ranks.processes[0].poll() is None


@pytest.mark.slow
def test_a_conversion_that_drifts_fails_its_gate_and_a_loosened_gate_lets_it_pass(
    small: list[str], tmp_path: Path
) -> None:
    settings = ["--import", "tests.support.faulty_parts", "--qat.backend", "drifting"]
    with train(2, *small, *settings) as ranks:
        assert ranks.wait() == [1, 1], ranks.printed()
        assert "the gate `convert` failed" in ranks.output(0)
    gate = read_json(RunDir(tmp_path / "run").results)["gates"]["convert"]
    assert not gate["passed"]
    assert gate["value"] < gate["bound"]
    train_done(2, *small, *settings, "--convert.agreement_bound", "0")
    assert read_json(RunDir(tmp_path / "run").results)["gates"]["convert"]["passed"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_of_three_ranks_goes_on_with_two(small: list[str], tmp_path: Path) -> None:
    undisturbed, changed = tmp_path / "undisturbed", tmp_path / "changed"
    train_done(3, *small[:2], "--run.dir", str(undisturbed), "--checkpoint.every_steps", "3")
    latest = RunDir(changed).checkpoints / "latest.json"
    with train(3, *small[:2], "--run.dir", str(changed), "--checkpoint.every_steps", "3") as ranks:
        assert ranks.until(lambda: latest.exists() and read_json(latest)["name"] >= "train-00000003")
        ranks.kill()
    assert read_json(RunDir(changed).status)["state"] != "done"
    train_done(2, *small[:2], "--run.dir", str(changed), "--checkpoint.every_steps", "3")

    report = check(changed)
    assert report.ok, str(report)
    worlds = {len(lines) for lines in read_steps(changed).values()}
    assert worlds == {2, 3}
    weights = [
        CheckpointFolder(RunDir(run).checkpoints).load("train-end")["payload"]["model"]
        for run in (undisturbed, changed)
    ]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-5)
    results = [read_json(RunDir(run).results)["models"] for run in (undisturbed, changed)]
    assert abs(results[0]["int8"]["top1"] - results[1]["int8"]["top1"]) <= 0.02
    assert read_json(changed / "export" / "manifest.json")["world_sizes"] == [3, 2]


@pytest.mark.slow
def test_without_batch_norm_the_losses_agree_at_any_world_size(small: list[str], tmp_path: Path) -> None:
    losses = {}
    for world in (1, 2, 3):
        run = tmp_path / str(world)
        train_done(world, *small[:2], "--run.dir", str(run), "--stages", "[train]", "--log.every_steps", "1")
        lines = [json.loads(line) for line in RunDir(run).metrics.read_text().splitlines()]
        losses[world] = torch.tensor([line["loss"] for line in lines if "loss" in line])
        assert len(losses[world]) == 33
    torch.testing.assert_close(losses[2], losses[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses[3], losses[1], rtol=1e-5, atol=1e-5)


def test_a_folder_of_somebody_else_is_refused_and_left_alone(small: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with train(2, *small) as ranks:
        start = time.monotonic()
        assert ranks.wait() == [78, 78], ranks.printed()
        assert "not a run directory" in ranks.output(0)
    assert time.monotonic() - start < 60
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_the_user_s_own_config_yaml_is_not_taken_for_a_run_s(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "project").mkdir()
    own = tmp_path / "project" / "config.yaml"
    own.write_text("# written by hand\n" + (tmp_path / "small.yaml").read_text())
    before = own.read_text()
    assert run_here("run", str(own), "--run.dir", str(own.parent)) == 78
    assert "not a run directory" in capsys.readouterr().err
    assert own.read_text() == before
    assert [entry.name for entry in own.parent.iterdir()] == ["config.yaml"]


@pytest.mark.slow
def test_ranks_started_with_different_settings_say_so(small: list[str], tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text((tmp_path / "small.yaml").read_text().replace("lr: 0.02", "lr: 0.03"))
    with train(2, *small) as ranks:
        ranks.kill([1])
        # Starts rank 1 again by hand, with another config file.
        environ = dict(
            os.environ,
            RANK="1",
            LOCAL_RANK="1",
            WORLD_SIZE="2",
            LOCAL_WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=ranks.port,
        )
        answer = subprocess.run(
            [sys.executable, "-m", "dist_train", "run", str(other), *small[2:]],
            env=environ,
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
        )
        assert answer.returncode == 78
        assert ranks.wait() == [78, -9]
        assert "different configurations" in ranks.output(0) + answer.stderr


def test_a_folder_of_somebody_else_survives_fast_dev_runs(small: list[str], tmp_path: Path) -> None:
    own = tmp_path / "run-fast-dev-run"
    own.mkdir()
    (own / "thesis.tex").write_text("years of work")
    assert run_here(*small, "--fast-dev-run") == 78
    assert [entry.name for entry in own.iterdir()] == ["thesis.tex"]


def test_other_data_than_before_is_refused(
    small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [
        "--import",
        "tests.support.faulty_parts",
        "--qat.backend",
        "refusing",
        "--data.name",
        "growing",
        "--data.args",
        "{}",
    ]
    for rows, code, message in (("60", 1, "conv7"), ("80", 1, "the dataset growing has changed")):
        monkeypatch.setenv("GROWING_ROWS", rows)
        assert run_here(*small, *settings) == code
        printed = capsys.readouterr()
        assert message in printed.err and "Traceback" not in printed.err + printed.out


@pytest.mark.slow
def test_a_buffer_that_follows_its_rank_s_data_is_named(small: list[str]) -> None:
    with train(
        2, *small, "--import", "tests.support.faulty_parts", "--model.name", "centred", "--model.args", "{}"
    ) as ranks:
        assert ranks.wait() == [78, 78], ranks.printed()
        assert "the buffer 0.centre differs between ranks" in ranks.output(0)


@pytest.mark.slow
@pytest.mark.parametrize("planted", ["data", "killed"])
def test_when_rank_0_fails_in_training_the_others_and_status_json_say_why(
    planted: str, small: list[str], tmp_path: Path
) -> None:
    settings = [
        "--import",
        "tests.support.faulty_parts",
        "--data.name",
        "undecodable",
        "--data.workers",
        "0",
        "--data.args",
        f"{{planted: {planted}}}",
    ]
    with train(2, *small, *settings) as ranks:
        codes = ranks.wait()
        assert codes[1] == 1, ranks.printed()
        status = read_json(RunDir(tmp_path / "run").status)
        assert status["state"] == "failed"
        if planted == "data":
            assert "cannot decode image 7" in ranks.output(0)
            assert "Traceback" not in ranks.printed()
            kept = (tmp_path / "run" / "logs" / "failure-0-rank0.txt").read_text()
            assert "Traceback" in kept and "cannot decode image 7" in kept
            assert "rank 0 failed: dist_train.errors.DataError: item 7 of _Undecodable" in ranks.output(1)
            assert "cannot decode image 7" in status["error"]
        else:
            assert codes[0] == -9
            assert "connection to another rank was lost" in ranks.output(1)


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (
            ["--model.args", "{colour: red}", "--data.args", "{num_trains: 3}", "--task.args", "{smoothing: 1}"],
            ["3 mistakes", "model.args", "data.args.num_trains", "task.args.smoothing"],
        ),
        (["--run.dir", "/proc/no/such"], ["cannot be used"]),
        (["--train.optim.lr", "1e6", "--stages", "[train]"], ["not finite"]),
    ],
)
def test_mistakes_end_with_a_sentence(
    arguments: list[str], messages: list[str], small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(*small, *arguments) in (1, 78)
    printed = capsys.readouterr()
    assert all(message in printed.err for message in messages) and "Traceback" not in printed.err + printed.out
