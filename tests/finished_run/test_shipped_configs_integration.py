"""Runs of the shipped configs: each model is exported in each format, and each file runs without dist_train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dist_train import registry
from dist_train.artifact.load import load_artifact
from dist_train.artifact.store import verify_artifact
from dist_train.cli import main
from dist_train.run_dir.files import read_json
from tests.support.foreign_process import answers
from tests.support.idx_files import write_fashion_mnist
from tests.support.image_files import write_folder
from tests.support.torch_settings import own_torch_settings

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
DATA: dict[str, Callable[[Path], object]] = {
    "fashion_mnist": lambda folder: write_fashion_mnist(folder, train=600, evaluation=120),
    "image_folder": lambda folder: write_folder(folder, train=40, val=10),
}
"""Writers of small data, by dataset; others need none."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_model_goes_to_each_format_and_runs_elsewhere(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = {
        each for name in registry.export_formats.names() for each in registry.export_formats.entry(name).missing()
    }
    if missing:
        pytest.skip(f"not installed: {', '.join(sorted(missing))}")
    dataset = yaml.safe_load(path.read_text())["data"]["name"]
    options = ["--run.dir", str(tmp_path / "run"), "--run.device", "cpu", "--run.threads_per_rank", "1"]
    options += ["--export.latency", "false", "--data.workers", "0"]
    if dataset == "languages":
        options += ["--data.args.source", "generated"]
    if dataset in DATA:
        DATA[dataset](tmp_path / "data")
        options += ["--data.root", str(tmp_path / "data")]
    run = tmp_path / "run-fast-dev-run"
    with own_torch_settings():
        assert main(["run", str(path), "--fast-dev-run", *options]) == 0
        formats = registry.export_formats.names()
        if dataset == "languages":
            formats.remove("executorch")  # it takes inputs of one size
        wanted = {}
        for model in ("fp32", "int8"):
            assert model in read_json(run / "results.json")["models"]
            command = ["export", str(run), "--model", model]
            wanted[model] = formats
            if model == "int8" and verify_artifact(run)["models"]["int8"]["kind"] == "torchscript":
                wanted[model] = []
                for name in formats:
                    assert main([*command, "--format", name]) == 1
                    assert f"TorchScript, of which {name} cannot be written" in capsys.readouterr().err
            options = [word for name in ["pt2", *wanted[model]] for word in ("--format", name)]
            assert main([*command, *options]) == 0, capsys.readouterr().err
    manifest = verify_artifact(run)
    # The child below neither draws named inputs nor prints named outputs; files were compared as they were written.
    if "input" not in manifest or dataset == "shapes":
        return
    (tmp_path / "elsewhere").mkdir()
    found = answers(run / "export", tmp_path / "elsewhere")
    written = {f"{model}/{name}" for model, names in wanted.items() for name in names}
    extra = {f"{model}/{name}" for model, each in manifest["models"].items() for name in each.get("extra", [])}
    assert found.keys() == {*wanted, *written, *extra}
    drawn = np.random.default_rng(0).random((7, *manifest["input"]["shape"][1:]), dtype=np.float32)
    for key in {*wanted, *written}:
        model = load_artifact(run, key.partition("/")[0])[0]
        for rows, outputs in found[key].items():
            expected = model(torch.from_numpy(drawn[: int(rows)]))
            difference = (torch.tensor(outputs) - expected).abs().max() / expected.abs().max()
            assert difference < (0.2 if "/" in key else 1e-4), (key, rows)
    assert all(found[name] > 0 for name in extra)
