"""Uses a finished run of two ranks in float and half: further formats, predictions, evaluation on other data."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import write_png

from dist_train import registry
from dist_train.artifact.deployable import Deployable
from dist_train.artifact.load import load_artifact
from dist_train.artifact.store import verify_artifact
from dist_train.cli import main
from dist_train.config.data import DataConfig
from dist_train.config.stages import ExportConfig
from dist_train.data.arrays import ImageArrays
from dist_train.data.datasets.fake import fake
from dist_train.data.splits import Splits
from dist_train.models.half_precision import HalfModel
from dist_train.models.small import mlp
from dist_train.programs.program import Program
from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.files import read_json
from dist_train.run_dir.paths import RunDir
from dist_train.stages.export import Export
from tests.support.compilers import hide_compiler
from tests.support.ranks import Ranks, train, train_done
from tests.support.torch_settings import own_torch_settings

ARGS: dict[str, Any] = {"num_train": 203, "num_eval": 61, "num_classes": 6, "channels": 1, "height": 8, "width": 8}
CONFIG = f"""
run: {{name: small, threads_per_rank: 1, device: cpu}}
data:
  name: fake
  args: {json.dumps(ARGS)}
  global_batch_size: 20
  cache_dir: CACHE
model: {{name: mlp, args: {{size: 8, hidden: 32}}}}
train: {{epochs: 4, optim: {{lr: 0.02}}}}
ptq: {{samples: 64}}
convert: {{runtime: none}}
export: {{latency: false}}
"""


def needs(*formats: str) -> pytest.MarkDecorator:
    missing = [name for each in formats for name in registry.export_formats.entry(each).missing()]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def config(folder: Path, stages: str) -> Path:
    path = folder / "small.yaml"
    path.write_text(CONFIG.replace("CACHE", str(folder / "cache")) + f"stages: {stages}\n")
    return path


@pytest.fixture(scope="module", autouse=True)
def settings_of_torch() -> Iterator[None]:
    """Restores torch's settings, which the commands set for this process, shared with other tests."""
    with own_torch_settings():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the directory of a run of train, half and export on two ranks."""
    folder = tmp_path_factory.mktemp("half")
    printed = train_done(
        2, "run", str(config(folder, "[train, half, export]")), "--run.dir", str(folder / "run"), "--half.dtype", "bf16"
    )
    assert "half: bf16, as half.dtype says" in printed
    return folder / "run"


@pytest.fixture(scope="module")
def splits() -> Splits:
    return fake(DataConfig(name="fake", args=ARGS))


def trained(run: Path) -> torch.nn.Module:
    model = mlp(num_classes=6, in_channels=1, size=8, hidden=32)
    model.load_state_dict(CheckpointFolder(RunDir(run).checkpoints).load("train-end")["payload"]["model"])
    return model.eval()


def inputs(splits: Splits) -> torch.Tensor:
    assert isinstance(splits.eval, ImageArrays)
    return (splits.eval.images.float() / 255 - splits.mean[0]) / splits.std[0]


def accuracy(outputs: torch.Tensor, splits: Splits) -> float:
    assert isinstance(splits.eval, ImageArrays)
    return float((outputs.argmax(1) == splits.eval.targets).float().mean())


def test_half_is_evaluated_exactly_by_both_ranks(run: Path, splits: Splits) -> None:
    models = read_json(RunDir(run).results)["models"]
    with torch.no_grad():
        expected = HalfModel(trained(run), "bf16")(inputs(splits))
    assert models["bf16"]["count"] == 61
    assert models["bf16"]["top1"] == pytest.approx(accuracy(expected, splits))
    assert models["bf16"]["bytes"] < models["fp32"]["bytes"]


def test_the_half_model_is_what_is_deployed_and_its_artifact_was_proved(run: Path, splits: Splits) -> None:
    model, manifest = load_artifact(run)
    assert (manifest["default"], manifest["models"]["bf16"]["file"]) == ("bf16", "model.pt2")
    assert manifest["ranges_sha256"] is None
    assert read_json(RunDir(run).results)["gates"]["artifact"]["passed"]
    outputs = model(inputs(splits))
    assert outputs.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(outputs, HalfModel(trained(run), "bf16")(inputs(splits)))
        assert not torch.equal(outputs, trained(run)(inputs(splits)))


# ---- export from a finished run


def test_another_model_is_added_without_the_data(run: Path, splits: Splits, capsys: pytest.CaptureFixture[str]) -> None:
    before = verify_artifact(run / "export")["files"]["model.pt2"]
    moved = run.parent / "cache"
    moved.rename(run.parent / "elsewhere")
    assert main(["export", str(run), "--model", "fp32"]) == 0
    (run.parent / "elsewhere").rename(moved)
    assert "fp32: model.fp32.pt2" in capsys.readouterr().out
    manifest = verify_artifact(run)
    assert manifest["default"] == "bf16"
    assert manifest["files"]["model.pt2"] == before
    with torch.no_grad():
        assert torch.equal(load_artifact(run, "fp32")[0](inputs(splits)), trained(run)(inputs(splits)))


@needs("onnx", "openvino")
def test_formats_are_written_read_back_and_listed_with_their_hashes(run: Path, splits: Splits) -> None:
    import onnxruntime

    assert main(["export", str(run), "--model", "fp32", "--format", "onnx", "--format", "openvino"]) == 0
    manifest = verify_artifact(run)
    formats = manifest["models"]["fp32"]["formats"]
    assert formats["onnx"]["files"] == ["model.fp32.onnx"]
    assert formats["openvino"]["files"] == ["model.fp32.xml", "model.fp32.bin"]
    assert {"model.fp32.onnx", "model.fp32.xml", "model.fp32.bin"} <= set(manifest["files"])
    assert all(0 <= each["difference"] < 1e-5 for each in formats.values())
    session = onnxruntime.InferenceSession(run / "export" / "model.fp32.onnx")
    with torch.no_grad():
        expected = trained(run)(inputs(splits))
    (answer,) = session.run(None, {"input": inputs(splits).numpy()})
    torch.testing.assert_close(torch.from_numpy(answer), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@needs("onnx", "openvino")
def test_auto_writes_the_fastest_and_leaves_its_table_in_the_results(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hide_compiler(monkeypatch)
    monkeypatch.delitem(registry.export_formats._entries, "executorch")
    assert main(["export", str(run), "--model", "fp32", "--format", "auto"]) == 0
    rows = read_json(RunDir(run).results)["models"]["fp32"]["runtimes"]
    assert {row["runtime"].split()[0] for row in rows} == {"onnxruntime", "openvino", "inductor"}
    (chosen,) = [row for row in rows if row["chosen"]]
    assert chosen["difference"] < 1e-5
    assert set(chosen["latency_ms"]["fp32"]) == {"1", "32"}
    assert chosen["format"] in verify_artifact(run)["models"]["fp32"]["formats"]
    assert f"fp32: {chosen['format']} for {chosen['runtime']}, the fastest" in capsys.readouterr().out


@needs("onnx")
@pytest.mark.slow
def test_auto_in_a_run_chooses_warns_and_tells_the_manifest_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_compiler(monkeypatch)
    settings = ["--export.formats", "[auto]", "--import", "tests.support.slow_format", "--train.epochs", "2"]
    settings += ["--export.latency_batch_sizes", "[1]"]
    path = config(tmp_path, "[train, ptq, convert, export]")
    printed = train_done(1, "run", str(path), "--run.dir", str(tmp_path / "run"), *settings)
    rows = {row["format"]: row for row in read_json(RunDir(tmp_path / "run").results)["models"]["int8"]["runtimes"]}
    assert {name: row["chosen"] for name, row in rows.items()} == {"onnx": True, "sluggish": False, "pt2": False}
    assert rows["onnx"]["agreement"] >= 0.99
    model = verify_artifact(tmp_path / "run")["models"]["int8"]
    assert model["formats"].keys() == {"onnx"}
    assert (model["chosen"]["format"], model["chosen"]["runtime"]) == ("onnx", rows["onnx"]["runtime"])
    assert f"the fastest of {rows['onnx']['runtime']}, sluggish 1 on the machine" in model["chosen"]["why"]
    assert "inductor left out: no C++ compiler" in model["chosen"]["why"]
    assert f"export: int8: onnx for {rows['onnx']['runtime']}, the fastest that answers right" in printed
    assert "export: warning: in sluggish 1 int8 is slower than FP32 at batch 1" in printed


def test_a_run_warns_where_int8_is_slower_than_fp32_in_the_same_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"fp32": {"1": 1.0, "32": 10.0}, "int8": {"1": 2.0, "32": 5.0}}
    said: list[str] = []
    deployables = {
        name: Deployable(
            name=name, program=Program("pt2", b""), outputs=torch.zeros(1), call=lambda batch: batch, source=None
        )
        for name in times
    }
    run = SimpleNamespace(seed=0)
    context: Any = SimpleNamespace(
        config=SimpleNamespace(run=run), threads=1, progress=SimpleNamespace(say=said.append)
    )
    for runtimes in ({"fp32": "swift", "int8": "swift"}, {"fp32": "swift", "int8": "torchscript"}):
        monkeypatch.setattr("dist_train.stages.export.time_models", lambda *_, found=runtimes: (times, found))
        figures: dict[str, dict[str, Any]] = {"fp32": {}, "int8": {}}
        Export("export", ExportConfig())._time(context, deployables, torch.zeros(2, 1), figures)
        assert figures["int8"] == {"latency_ms": times["int8"], "runtime": runtimes["int8"]}
    assert said == ["export: warning: in swift int8 is slower than FP32 at batch 1: 2 ms against 1"]


@pytest.mark.slow
@needs("executorch")
def test_fp32_is_written_for_executorch(run: Path, splits: Splits) -> None:
    from executorch.runtime import Runtime

    assert main(["export", str(run), "--model", "fp32", "--format", "executorch"]) == 0
    assert verify_artifact(run)["models"]["fp32"]["formats"]["executorch"]["difference"] < 1e-5
    program = Runtime.get().load_program(run / "export" / "model.fp32.pte")
    method = program.load_method("forward")
    assert method is not None
    with torch.no_grad():
        expected = trained(run)(inputs(splits)[:1])
    torch.testing.assert_close(method.execute((inputs(splits)[:1],))[0], expected, rtol=1e-4, atol=1e-4)


@needs("onnx")
def test_what_a_runtime_cannot_take_is_refused_and_leaves_the_artifact(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in (run / "export").iterdir()}
    assert main(["export", str(run), "--format", "onnx", "--model", "half"]) == 1
    assert "bf16 cannot be written as onnx: ONNX Runtime cannot run this model" in (error := capsys.readouterr().err)
    assert "--half.dtype fp16" in error
    assert {path: path.read_bytes() for path in (run / "export").iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--model", "int8"], 78, "has no model 'int8'"),
        (["--format", "onyx"], 78, "did you mean onnx?"),
        (["--formt", "onnx"], 78, "did you mean --format?"),
        (["--format"], 78, "--format has no value"),
    ],
)
def test_mistakes_of_export_say_what_to_type(
    run: Path, arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), *arguments]) == code
    assert said in capsys.readouterr().err


def test_a_missing_package_is_named_with_what_to_type(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = registry.Entry("dist_train.lowering.onnx:write", requires={"no_such_module_at_all": "no-such-package"})
    monkeypatch.setitem(registry.export_formats._entries, "onnx", entry)
    assert main(["export", str(run), "--format", "onnx"]) == 78
    assert "pip install no-such-package" in capsys.readouterr().err


def test_export_is_for_one_process(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["export", str(run)]) == 78
    assert "without torchrun" in capsys.readouterr().err


# ---- predict


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, splits: Splits) -> Path:
    """Makes a folder of ten PNGs of the evaluation set, and one of 16 x 16 pixels in colour."""
    folder = tmp_path_factory.mktemp("pictures")
    assert isinstance(splits.eval, ImageArrays)
    for number, image in enumerate(splits.eval.images[:10]):
        write_png(image, str(folder / f"{number}.png"))
    (folder / "more").mkdir()
    doubled = splits.eval.images[0].repeat_interleave(2, 1).repeat_interleave(2, 2).expand(3, -1, -1)
    write_png(doubled.contiguous(), str(folder / "more" / "large.PNG"))
    return folder


def test_predictions_are_those_of_the_model_as_csv(
    run: Path, pictures: Path, splits: Splits, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(run), str(pictures), "--format=csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [Path(row["file"]).name for row in rows] == [*(f"{number}.png" for number in range(10)), "large.PNG"]
    probabilities, places = load_artifact(run)[0](inputs(splits)[:10]).softmax(1).max(1)
    assert [row["class"] for row in rows[:10]] == [splits.classes[place] for place in places]
    assert [float(row["probability"]) for row in rows[:10]] == pytest.approx(probabilities.tolist(), abs=1e-5)
    assert rows[10]["class"] == rows[0]["class"]  # resized and converted to gray, it equals the first picture


def test_json_gives_the_likeliest_classes_of_the_model_that_was_named(
    run: Path, pictures: Path, splits: Splits, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern = str(pictures / "[0-2].png")
    assert main(["predict", str(run / "export"), pattern, "--format", "json", "--top", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = load_artifact(run)[0](inputs(splits)[:3]).softmax(1).topk(3)
    assert [Path(each["file"]).name for each in found] == ["0.png", "1.png", "2.png"]
    for each, places, values in zip(found, expected.indices, expected.values, strict=True):
        assert [row["class"] for row in each["predictions"]] == [splits.classes[place] for place in places]
        assert [row["probability"] for row in each["predictions"]] == pytest.approx(values.tolist(), abs=1e-5)


def test_an_unreadable_image_is_named_and_the_others_are_predicted(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes((pictures / "0.png").read_bytes()[:40])
    assert main(["predict", str(run), str(pictures / "0.png"), str(broken), str(pictures / "1.png")]) == 1
    printed = capsys.readouterr()
    assert [line.split(",")[0][-5:] for line in printed.out.splitlines()[1:]] == ["0.png", "1.png"]
    assert f"{broken} cannot be decoded" in printed.err


def test_odd_images_cost_their_own_rows_at_most(
    run: Path, pictures: Path, splits: Splits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert isinstance(splits.eval, ImageArrays)
    plain = Image.fromarray(splits.eval.images[0, 0].numpy())
    turned = Image.Exif()
    turned[0x0112] = 6
    plain.save(tmp_path / "plain.png")
    plain.rotate(90, expand=True).save(tmp_path / "turned.png", exif=turned)
    Image.fromarray(np.asarray(plain).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    plain.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("L", plain.size)])
    (tmp_path / "link.png").symlink_to("nowhere.png")
    (tmp_path / "text.jpg").write_text("no image")
    assert main(["predict", str(run), str(tmp_path)]) == 1
    printed = capsys.readouterr()
    rows = list(csv.reader(io.StringIO(printed.out)))[1:]
    assert [Path(row[0]).name for row in rows] == ["deep.png", "moving.gif", "plain.png", "turned.png"]
    assert len({tuple(row[1:]) for row in rows}) == 1, "they show the same pixels"
    assert "link.png is a link that leads nowhere" in printed.err and "text.jpg cannot be decoded" in printed.err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nowhere.png"], 1, "there is no file nowhere.png"),
        (["."], 1, "holds no image"),
        (["x.png", "--top", "0"], 78, "--top: must be a whole number, at least 1"),
        (["x.png", "--format", "xml"], 78, "--format xml is unknown"),
        ([], 78, "predict: missing argument 'IMAGE"),
    ],
)
def test_mistakes_of_predict_say_what_to_type(
    run: Path,
    arguments: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["predict", str(run), *arguments]) == code
    assert said in capsys.readouterr().err


# ---- evaluate


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["evaluate", *arguments, "--json"]) == 0
    models: dict[str, Any] = json.loads(capsys.readouterr().out)["models"]
    return models


def test_the_models_of_a_run_are_evaluated_as_in_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = read_json(RunDir(run).results)["models"]
    models = evaluated(capsys, str(run))
    assert list(models) == ["fp32", "bf16"]
    for name, metrics in models.items():
        assert metrics == pytest.approx({key: recorded[name][key] for key in metrics})


def test_one_model_on_other_data_is_normalised_as_in_training(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "darker.py").write_text(
        "import dataclasses, dist_train\n"
        "from dist_train.data.datasets.fake import fake\n"
        "@dist_train.register_dataset('darker')\n"
        "def darker(data):\n"
        "    splits = fake(data.model_copy(update={'name': 'fake'}))\n"
        "    return dataclasses.replace(splits, mean=(0.1,), std=(0.9,))\n"
    )
    monkeypatch.chdir(tmp_path)
    other = json.dumps({**ARGS, "num_eval": 75})
    models = evaluated(capsys, str(run), "--model", "fp32", "--data.args", other)
    assert models["fp32"]["count"] == 75
    darker = ["--import", "darker", "--data.name", "darker", "--data.args", other]
    assert evaluated(capsys, str(run), "--model", "fp32", *darker) == models


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_artifact_is_evaluated_on_several_ranks(run: Path, splits: Splits) -> None:
    path = str(run / "export" / "model.pt2")
    with Ranks(2, ["-m", "dist_train", "evaluate", str(run), "--model", path, "--json"]) as ranks:
        assert ranks.wait() == [0, 0], ranks.printed()
        results = json.loads(ranks.output(0))
        assert ranks.output(1) == ""
    assert results["world_size"] == 2
    assert results["models"][path]["count"] == 61
    assert results["models"][path]["top1"] == pytest.approx(accuracy(load_artifact(run)[0](inputs(splits)), splits))


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--model", "int8"], 78, "has no model 'int8'"),
        (["--data.args.num_classes", "7"], 1, "the model has 6 outputs, but the data needs 7"),
        (["--data.args.channels", "3"], 1, "takes inputs of shape [1, 8, 8], but the data has [3, 8, 8]"),
        (["--data.nam", "digits"], 78, "data.nam"),
        (["--train.epochs", "3"], 78, "evaluate has no option --train.epochs"),
    ],
)
def test_mistakes_of_evaluate_say_what_is_wrong(
    run: Path, arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run), *arguments]) == code
    assert said in capsys.readouterr().err


# ---- interrupted, and with all formats


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_killed_in_export_resumes_with_what_half_had_chosen(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    command = ["run", str(config(tmp_path, "[train, half, export]")), "--run.dir", str(directory)]
    with train(1, *command, "--half.dtype", "fp16") as ranks:
        assert ranks.until(lambda: CheckpointFolder(RunDir(directory).checkpoints).latest == "half-end")
        ranks.kill()
    assert read_json(RunDir(directory).status)["state"] == "running"
    printed = train_done(1, *command, "--half.dtype", "fp16")
    assert "after half" in printed
    assert verify_artifact(directory)["default"] == "fp16"
    assert set(read_json(RunDir(directory).results)["models"]) == {"fp32", "fp16"}


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs("onnx", "openvino", "executorch")
def test_a_run_exports_all_its_models_in_all_formats_and_times_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(tmp_path, "[train, half, ptq, convert, export]")
    settings = ["--export.models", "[int8, fp32, half]", "--export.formats", "[onnx, openvino]", "--half.dtype", "fp16"]
    train_done(2, "run", str(path), "--run.dir", str(tmp_path / "run"), *settings, "--export.latency", "true")
    models = verify_artifact(tmp_path / "run")["models"]
    assert {name: each["file"] for name, each in models.items()} == {
        "int8": "model.pt2",
        "fp32": "model.fp32.pt2",
        "fp16": "model.fp16.pt2",
    }
    assert all(set(each["formats"]) == {"onnx", "openvino"} for each in models.values())
    figures = read_json(RunDir(tmp_path / "run").results)["models"]
    assert all(set(figures[name]["latency_ms"]) == {"1", "32"} for name in models)
    assert figures["int8"]["runtime"] == figures["fp32"]["runtime"]
    assert main(["export", str(tmp_path / "run"), "--format", "executorch"]) == 0
    assert "int8 as executorch: model.pte, executorch " in capsys.readouterr().out
