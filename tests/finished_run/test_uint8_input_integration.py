"""A run with `export.input: uint8`: its artifact agrees with the float one on real rows, and every command takes it."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.io import write_png

import dist_train
from dist_train import registry
from dist_train.artifact.load import load_artifact
from dist_train.artifact.store import verify_artifact
from dist_train.cli import main
from dist_train.config.data import DataConfig
from dist_train.data.arrays import ImageArrays
from dist_train.data.datasets.fake import fake
from dist_train.data.splits import Splits
from dist_train.run_dir.files import read_json
from dist_train.run_dir.paths import RunDir
from tests.support.compilers import hide_compiler
from tests.support.small_runs import Runs, run_here
from tests.support.torch_settings import own_torch_settings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(registry.export_formats.entry("onnx").missing()), reason="not installed"),
]
ARGS: dict[str, Any] = {"num_train": 203, "num_eval": 61, "num_classes": 6, "channels": 1, "height": 8, "width": 8}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of two runs that differ in `export.input`."""
    made = Runs(tmp_path_factory.mktemp("inputs"))
    settings = ["--stages", "[train, ptq, convert, export]", "--convert.runtime", "none", "--export.latency", "false"]
    for name in ("float", "uint8"):
        assert made(name, *settings, "--export.input", name, "--export.formats", "[onnx]") == 0
    return made.folder


def pixels() -> tuple[torch.Tensor, Splits]:
    splits = fake(DataConfig(name="fake", args=ARGS))
    assert isinstance(splits.eval, ImageArrays)
    return splits.eval.images, splits


@pytest.mark.slow
def test_the_artifacts_agree_on_all_real_rows(runs: Path) -> None:
    images, splits = pixels()
    call, manifest = load_artifact(runs / "uint8")
    plain, _ = load_artifact(runs / "float")
    assert manifest["input"]["dtype"] == "uint8"
    assert manifest["normalization"] == {"mean": list(splits.mean), "std": list(splits.std)}
    torch.testing.assert_close(
        call(images), plain((images / 255 - splits.mean[0]) / splits.std[0]), rtol=1e-4, atol=1e-4
    )
    gates = read_json(RunDir(runs / "uint8").results)["gates"]
    assert gates["artifact"]["passed"] and gates["format_onnx"]["value"] >= 0.99
    float_models, models = (read_json(RunDir(runs / name).results)["models"] for name in ("float", "uint8"))
    assert models["int8"]["top1"] == float_models["int8"]["top1"]


def test_the_onnx_file_takes_pixels(runs: Path) -> None:
    import onnxruntime

    images, _ = pixels()
    session = onnxruntime.InferenceSession(runs / "uint8" / "export" / "model.onnx")
    (answer,) = session.run(None, {"input": images.numpy()})
    expected = load_artifact(runs / "uint8")[0](images)
    assert (torch.from_numpy(answer).argmax(1) == expected.argmax(1)).float().mean() > 0.98


def test_predict_and_evaluate_give_what_the_float_artifact_gives(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, _ = pixels()
    for place in range(5):
        write_png(images[place], str(tmp_path / f"{place}.png"))
    found = []
    for name in ("float", "uint8"):
        assert main(["predict", str(runs / name), str(tmp_path)]) == 0
        found.append(list(csv.DictReader(io.StringIO(capsys.readouterr().out))))
    assert [row["class"] for row in found[0]] == [row["class"] for row in found[1]] and len(found[0]) == 5
    recorded = read_json(RunDir(runs / "uint8").results)["models"]["int8"]
    for model in ("int8", str(runs / "uint8" / "export")):
        with own_torch_settings():
            assert main(["evaluate", str(runs / "uint8"), "--model", model]) == 0
        assert f"{recorded['top1'] * 100:.2f} %" in capsys.readouterr().out


@pytest.mark.slow
def test_a_later_export_and_a_benchmark_keep_the_artifacts_input(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_compiler(monkeypatch)
    images, _ = pixels()
    with own_torch_settings():
        assert main(["export", str(runs / "uint8"), "--model", "fp32", "--format", "onnx"]) == 0
    assert verify_artifact(runs / "uint8")["input"]["dtype"] == "uint8"
    call, _ = load_artifact(runs / "uint8", "fp32")
    agreed = call(images).argmax(1) == load_artifact(runs / "uint8")[0](images).argmax(1)
    assert agreed.float().mean() > 0.9
    arguments = ["--seconds", "0.01", "--formats", "pt2", "onnx", "--output", str(tmp_path / "out")]
    with own_torch_settings():
        assert main(["benchmark", str(runs / "uint8"), *arguments]) == 0
    rows = [row for row in read_json(tmp_path / "out" / "benchmark.json")["rows"] if row["runtime"] != "inductor"]
    assert all(row["agreement"] > 0.97 and row["latency_ms"] and row["exported"] for row in rows)


class Finished(torch.utils.data.Dataset[Any]):
    """Finished float tensors, as a dataset with transforms of its own gives them."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        return torch.full((1, 8, 8), index / 40), index % 2


@dist_train.register_dataset("finished_floats")
def finished_floats(settings: DataConfig) -> Splits:
    return Splits(Finished(), Finished(), num_classes=2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["--data.name", "finished_floats", "--data.args", "{}"], "Finished gives float32"),
        (["--qat.backend", "fx", "--stages", "[train, ptq, convert, export]"], "TorchScript of the backend 'fx'"),
    ],
)
def test_what_has_no_pixels_is_refused_before_training(
    settings: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Runs(tmp_path)
    given = ["--stages", "[train, export]", "--data.workers", "0", "--export.input", "uint8", *settings]
    code = run_here("run", str(made.config), "--run.dir", str(tmp_path / "run"), *given)
    error = capsys.readouterr().err
    assert code == 78 and said in error and "--export.input float" in error
