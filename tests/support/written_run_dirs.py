"""Writes run directories as a run leaves them, without training, for tests of their readers."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import yaml

from dist_train.run_dir.files import replace_json
from dist_train.run_dir.paths import RunDir

# One grey pixel.
PNG = base64.b64encode(
    base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg==")
).decode()
CLASSES = ["cat", "dog", "<b>bird</b>"]


def line(stage: str, step: int, attempt: int = 0, **scalars: float | None) -> dict[str, Any]:
    return {"time": 1.0, "stage": stage, "epoch": 0, "step": step, "attempt": attempt, **scalars}


def curves(loss: float = 1.0) -> list[dict[str, Any]]:
    lines = [
        line("train", step, loss=loss / (step + 1), score=0.5, lr=0.1, samples_per_second=100.0) for step in range(8)
    ]
    lines.append(line("train", 7, eval_top1=0.9, eval_loss=0.2, eval_count=30))
    return [*lines, line("qat", 0, loss=0.1, score=1.0, lr=0.01, samples_per_second=50.0)]


def details(classes: list[str] | None = None) -> dict[str, Any]:
    names = CLASSES if classes is None else classes
    count = len(names)
    matrix = [[9 if row == column else int(row == 0) for column in range(count)] for row in range(count)]
    sample = {"id": 17, "loss": 2.5, "target": 0, "decision": count - 1, "image": PNG}
    return {
        "model": "fp32",
        "classes": names,
        "metrics": {"confusion": matrix, "per_class": [9 / sum(row) for row in matrix]},
        "worst": [sample, {**sample, "id": 18, "loss": 0.5, "decision": 0, "image": None}],
    }


def finished(path: Path, name: str = "first", lines: list[dict[str, Any]] | None = None) -> Path:
    """Writes a finished run with fp32 and int8."""
    run = RunDir(path)
    run.report.mkdir(parents=True)
    config = {
        "run": {"name": name, "seed": 0},
        "data": {"name": "digits"},
        "model": {"name": "small_resnet"},
        "stages": ["train", "qat", "convert"],
    }
    run.config.write_text(yaml.safe_dump(config))
    replace_json(run.environment, {"python": "3.11", "packages": {"torch": "2.14"}, "world_size": 2, "device": "cpu"})
    replace_json(run.status, {"state": "done", "stage": "qat", "step": 0, "restarts": 0, "error": None})
    log(run, curves() if lines is None else lines)
    figures = {"top1": 0.9, "loss": 0.2, "count": 30}
    replace_json(
        run.results,
        {
            "run": name,
            "world_size": 2,
            "stages": {"train": {"seconds": 3.5, "steps": 8}, "ptq": {"seconds": 1.0}},
            "models": {
                "fp32": {**figures, "bytes": 4096, "latency_ms": {"1": 0.5}, "runtime": "openvino"},
                "int8": {
                    **figures,
                    "bytes": 1024,
                    "latency_ms": {"1": 0.25},
                    "runtime": "openvino",
                    "weights": {
                        "share": 0.6239,
                        "int8": 6239,
                        "float": 3761,
                        "float_modules": {"lstm": 3000, "up": 761},
                    },
                },
            },
            "gates": {
                "convert": {"value": 0.995, "bound": 0.99, "passed": True},
                "artifact": {"value": None, "bound": 1e-5, "passed": False},
            },
            "gates_skipped": {"lowered": "onnxscript not installed"},
        },
    )
    for model in ("int8", "fp32"):
        replace_json(run.details(model), details())
    return path


def log(run: RunDir, lines: list[dict[str, Any]]) -> None:
    run.metrics.write_text("".join(json.dumps(each) + "\n" for each in lines))


def started(path: Path, state: str = "running", error: str | None = None) -> Path:
    """Writes a run that has just begun: no results, and an incomplete last line of metrics."""
    run = RunDir(path)
    path.mkdir()
    run.config.write_text(yaml.safe_dump({"run": {"name": path.name}, "stages": ["train"]}))
    replace_json(run.status, {"state": state, "stage": "train", "step": 2, "restarts": 0, "error": error})
    log(run, [line("train", step, loss=None if step == 1 else 1.0) for step in range(3)])
    with run.metrics.open("a") as file:
        file.write('{"time":1.0,"stage":"tr')
    return path
