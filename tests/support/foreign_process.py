"""Runs the manifest's `usage` of every file of an artifact in a process that cannot import dist_train."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

_CHILD = """
import json, pathlib, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "dist_train":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())  # an editable installation is found from everywhere
import numpy
folder, rows = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
models = json.loads((folder / "manifest.json").read_text())["models"]
taken = json.loads((folder / "manifest.json").read_text())["input"]
shape = taken["shape"][1:]
outputs = {}

def run(file, usage, images):
    *before, last = usage.split("; ")
    names = {"FILE": str(folder / file), "images": images}
    exec("\\n".join(before), names)
    return eval(last, names)

def outputs_of(key, file, usage, rows):
    drawn = numpy.random.default_rng(0).random((max(rows), *shape), dtype=numpy.float32)
    if taken.get("dtype") == "uint8":
        drawn = (drawn * 255).astype(numpy.uint8)
    outputs[key] = {count: numpy.asarray(run(file, usage, drawn[:count])).tolist() for count in rows}

for name, model in models.items():
    outputs_of(name, model["file"], model["usage"], rows)
    for format, each in model.get("formats", {}).items():
        outputs_of(f"{name}/{format}", each["files"][0], each["usage"], [1] if format == "executorch" else rows)
    for file, usage in model.get("extra_usage", {}).items():
        outputs[f"{name}/{file}"] = len(run(file, usage, None))
try:
    import dist_train
    sys.exit("dist_train can be imported here")
except ModuleNotFoundError:
    assert not [name for name in sys.modules if name.startswith("dist_train")]
print(json.dumps(outputs))
"""


def answers(artifact: Path, folder: Path, rows: tuple[int, ...] = (1, 7)) -> dict[str, Any]:
    """Runs each `usage` on batches of these sizes, which `numpy.random.default_rng(0)` draws.

    Args:
        artifact: the folder of manifest.json.
        folder: an empty one, the child's working directory.

    Returns:
        Outputs as lists, by model, or MODEL/FORMAT, and by batch size as text; the number of tensors of an extra file.
    """
    command = [sys.executable, "-I", "-W", "ignore", "-c", _CHILD, str(artifact.resolve()), json.dumps(rows)]
    done = subprocess.run(command, cwd=folder, env={}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
