"""A third party's package adds a part of each kind, by entry points once installed, or by --import."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_train.run_dir.files import read_json
from dist_train.run_dir.paths import RunDir
from tests.support.ranks import ROOT, Ranks

pytestmark = pytest.mark.slow
SOURCE = ROOT / "tests" / "plugin_package"
CONFIG = """
run: {name: bright, threads_per_rank: 1, device: cpu}
data: {name: brightness, args: {rows: 100}, global_batch_size: 20}
model: {name: brightness_net, args: {width: 4}}
task: {name: log_cosh, args: {tolerance: 0.3}}
strategy: clamped
stages: [train, norms, qat, convert]
train: {epochs: 4, optim: {lr: 0.5}}
norms: {order: 1}
qat:
  epochs: 1
  backend: float_head
  optim: {name: normed_sgd, lr: 0.01, args: {longest: 0.5}}
  schedule: {name: falling, args: {last: 0.2}}
trackers: [jsonl, csv]
log: {every_steps: 1}
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder that pip installed the package into."""
    folder = tmp_path_factory.mktemp("plugin")
    source, target = folder / "source", folder / "site-packages"
    shutil.copytree(SOURCE, source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    subprocess.run(
        [*pip, "--no-build-isolation", "--target", str(target), str(source)],
        check=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert list(target.glob("brightness-1.0.dist-info/entry_points.txt"))
    return target


def trained(folder: Path, path: Path, *arguments: str) -> dict[str, Any]:
    """Runs CONFIG in `folder` with `path` on PYTHONPATH, checks each part's effect, and returns the results."""
    (folder / "bright.yaml").write_text(CONFIG)
    environ = {"PYTHONPATH": f"{ROOT}:{path}", "XDG_CACHE_HOME": str(folder / "cache")}
    with Ranks(1, ["-m", "dist_train", "run", "bright.yaml", *arguments], environ, folder) as ranks:
        assert ranks.wait() == [0], ranks.printed()
        printed = ranks.output(0)
    run_dir = RunDir(folder / "runs" / "bright")
    results: dict[str, Any] = read_json(run_dir.results)
    assert "  error 0." in printed, "the progress line names the task's score"
    int8 = results["models"]["int8"]
    assert set(int8) - {"lowered", "weights"} == {"error", "loss", "count"} and int8["count"] == 20
    assert results["models"]["int8"]["error"] < 0.3
    assert set(results["norms"]) == {
        f"{name}.{kind}" for name in ("conv", "hidden", "head") for kind in ("weight", "bias")
    }
    lines = [line.split(",") for line in (run_dir.path / "scalars.csv").read_text().splitlines()]
    steps = [line for line in lines if line[0] == "train" and line[2] == "loss"]
    assert len(steps) == 16 and float(steps[-1][3]) < float(steps[0][3])
    rates = [float(line[3]) for line in lines if line[0] == "qat" and line[2] == "lr"]
    assert rates == pytest.approx([0.01, 0.008, 0.006, 0.004])
    return results


@pytest.fixture(scope="module")
def by_entry_points(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return trained(tmp_path_factory.mktemp("entry_points"), installed)


def test_an_installed_package_is_found_by_its_entry_points(by_entry_points: dict[str, Any]) -> None:
    assert by_entry_points["gates"]["convert"]["passed"]


@pytest.mark.slow
def test_import_finds_the_same_parts(by_entry_points: dict[str, Any], tmp_path: Path) -> None:
    imported = trained(tmp_path, SOURCE / "src", "--import", "brightness")
    assert imported["models"] == by_entry_points["models"] and imported["norms"] == by_entry_points["norms"]


@pytest.mark.slow
def test_the_schema_shows_the_section_of_an_installed_stage(installed: Path, tmp_path: Path) -> None:
    environ = {"PYTHONPATH": f"{ROOT}:{installed}"}
    with Ranks(1, ["-m", "dist_train", "config", "schema"], environ, tmp_path) as ranks:
        assert ranks.wait() == [0], ranks.printed()
        schema = json.loads(ranks.output(0))
    section = schema["$defs"][schema["properties"]["norms"]["$ref"].rpartition("/")[2]]
    assert section["properties"]["order"]["description"] == "Order of the norm that is noted of each parameter."
    assert "brightness_net" in schema["$defs"]["ModelConfig"]["properties"]["name"]["examples"]
