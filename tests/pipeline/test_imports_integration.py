"""A process imports what it needs, when it needs it: start-up is most of a short run, on every rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import ROOT, Ranks

HEAVY = {
    "accelerate",
    "datasets",
    "executorch",
    "google",
    "jinja2",
    "jsonschema",
    "lightning_utilities",
    "matplotlib",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "pandas",
    "rich",
    "scipy",
    "sklearn",
    "tensorboard",
    "timm",
    "torchao",
    "torchmetrics",
    "torchvision",
    "transformers",
    "wandb",
}
"""Packages that a float step on digits does without. Those of the optimizers are torch's own: torch._dynamo, sympy."""
PARTS = ("torch._inductor.compile_fx", "dist_train.quantization.pt2e", "dist_train.quantization.torch_ao")
"""Modules that it does without, with what is below them."""

CONFIG = {
    "run": {"name": "light", "device": "cpu", "threads_per_rank": 1},
    "data": {"name": "digits", "global_batch_size": 256},
    "model": {"name": "small_resnet", "args": {"width": 4, "blocks": 1}},
    "task": {"name": "module_telling"},
    "stages": ["train"],
    "train": {"epochs": 1},
}


def heavy_in(file: Path) -> list[str]:
    names = file.read_text().splitlines()
    parts = tuple(f"{each}." for each in PARTS)
    return [name for name in names if name.split(".")[0] in HEAVY or f"{name}.".startswith(parts)]


@pytest.mark.slow
def test_a_train_step_has_imported_nothing_of_the_later_stages(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps(CONFIG))
    arguments = ["run", str(tmp_path / "config.yaml"), "--run.dir", str(tmp_path / "run")]
    command = ["-m", "dist_train", *arguments, "--import", "tests.support.module_telling_task"]
    with Ranks(1, command, {"TELL": str(tmp_path)}, cold=True) as ranks:
        assert ranks.wait() == [0], ranks.printed()
    assert heavy_in(tmp_path / "step") == []
    # The evaluation and its report's details, too. Only the table of results, at the end, needs a library.
    at_the_end = {name.split(".")[0] for name in heavy_in(tmp_path / "end")}
    assert at_the_end <= {"rich"}, at_the_end


def test_watcher_and_launcher_import_no_torch(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({**CONFIG, "task": {"name": "classification"}}))
    launch = f"from dist_train.cli import main; main(['launch', 'torchrun', '--dry-run', {str(config)!r}])"
    for code, most in (("import dist_train.distributed.watchdog.watcher", {"psutil"}), (launch, None)):
        asked = f"import sys\n{code}\nprint(*{{name.split('.')[0] for name in sys.modules}}, file=sys.stderr)"
        variables = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", asked], capture_output=True, text=True, env=variables, timeout=60, check=True
        )
        found = set(done.stderr.split())
        assert not found & {"torch", "numpy", *HEAVY}
        if most is not None:
            foreign = {name for name in found - set(sys.stdlib_module_names) if not name.startswith("_")}
            assert foreign <= {"dist_train", "cython_runtime", "sitecustomize", "distutils-precedence", *most}, foreign
