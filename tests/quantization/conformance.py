"""Conformance of models and backends: each pair is tried in a whole run, and the outcomes become a table of the docs.

`python -m tests.quantization.conformance` tries all pairs (about four minutes). It writes the record beside this file
and the table of docs/which-models-quantize.md.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

import dist_train
from dist_train.errors import DistTrainError
from dist_train.quantization.int8_share import in_percent
from dist_train.registry.torchvision_names import QUANTIZABLE
from tests.support import conformance_nets
from tests.support.ranks import ROOT

BACKENDS = ("pt2e", "fx", "eager")
RECORD = Path(__file__).with_suffix(".json")
PAGE = ROOT / "docs" / "which-models-quantize.md"
INT8 = "int8"


@dataclasses.dataclass(frozen=True)
class Model:
    """A row of the table.

    Attributes:
        name: of a registered model, torchvision's or one of `conformance_nets`.
        size: pixels of a side of the images.
        args: of the model.
        more: whether it is beyond the models that the suite is about.
    """

    name: str
    size: int = 32
    args: tuple[tuple[str, int], ...] = ()
    more: bool = False

    def for_backend(self, backend: str) -> str:
        """The eager backend wants a model with stubs: torchvision's quantizable one, where there is one."""
        quantizable = f"quantized_{self.name}"
        return quantizable if backend == "eager" and quantizable in QUANTIZABLE else self.name


MODELS = (
    Model("resnet18"),
    Model("resnet50"),
    Model("mobilenet_v2"),
    Model("mobilenet_v3_small"),
    Model("mobilenet_v3_large"),
    Model("efficientnet_b0"),
    Model("vit_b_16", args=(("image_size", 32),)),
    Model("convnext_tiny"),
    Model("mlp", args=(("size", 32),)),
    Model("reused_module"),
    Model("same_padding"),
    Model("branch_on_data"),
    Model("shufflenet_v2_x0_5", 64, more=True),
    Model("squeezenet1_1", more=True),
    Model("densenet121", more=True),
    Model("googlenet", more=True),
    Model("regnet_y_400mf", more=True),
    Model("mnasnet0_5", more=True),
    Model("swin_t", more=True),
)

_CONFIG = """\
run: {{name: conformance, dir: {folder}/run, threads_per_rank: 1, device: cpu}}
data:
  name: two_patterns
  cache_dir: {folder}/cache
  args: {{channels: 3, size: {size}}}
  global_batch_size: 8
  eval_batch_size: 32
model: {{name: settled, args: {{kind: {kind}, size: {size}, args: {args}}}}}
stages: [qat, convert, export]
ptq: {{samples: 16}}
qat: {{backend: {backend}, epochs: 1, optim: {{lr: 0.0001}}}}
convert: {{agreement_bound: 0.9}}
export: {{latency: false}}
"""
# The weights are not trained, and rounding grows from layer to layer of a deep random network: hence the looser bound
# of `convert`.


def try_pair(model: Model, backend: str, folder: Path) -> str:
    """Returns `INT8` and the int8 share of the weights if every gate passed; else the text of the refusal, on one line.

    Errors that are not meant for users are raised: they are bugs.
    """
    kind = model.for_backend(backend)
    file = folder / "conformance.yaml"
    settings = {"folder": folder, "size": model.size, "kind": kind, "backend": backend}
    file.write_text(_CONFIG.format(**settings, args=json.dumps(dict(model.args))))
    try:
        results = dist_train.run(dist_train.load_config(file))
    except DistTrainError as error:
        said = re.sub(r"\s+", " ", f"{error.message} -> {error.hint}").replace(str(folder), "")
        return re.sub(r"(?<=\.py) line \d+", "", said)
    assert results["gates"].keys() == {"prepare", "gradients", "convert", "lowered", "artifact"}
    assert all(gate["passed"] for gate in results["gates"].values())
    assert results["stages"]["qat"]["steps"] == 2
    return f"{INT8}, {in_percent(results['models']['int8']['weights']['share'])} %"


def is_int8(outcome: str) -> bool:
    """True for an outcome of `try_pair` with an int8 model."""
    return outcome.startswith(INT8)


def record() -> dict[str, dict[str, str]]:
    """Reads the last outcomes: by model and backend, as of `try_pair`."""
    seen: dict[str, dict[str, str]] = json.loads(RECORD.read_text())
    return seen


def table(seen: dict[str, dict[str, str]]) -> str:
    """The Markdown table of a record, with each refusal as a note under it."""
    notes: list[str] = []
    lines = ["| model | " + " | ".join(f"`{backend}`" for backend in BACKENDS) + " |", "|---|---|---|---|"]
    for model in MODELS:
        cells = [_cell(model, backend, seen[model.name][backend], notes) for backend in BACKENDS]
        lines.append(f"| `{model.name}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, start=1))])


def _cell(model: Model, backend: str, outcome: str, notes: list[str]) -> str:
    kind = model.for_backend(backend)
    if is_int8(outcome):
        return outcome if kind == model.name else f"{outcome}, as `{kind}`"
    note = re.sub(r"^\w+ (?=has no )", "the model ", outcome)  # one note for all classes that lack the same
    if note not in notes:
        notes.append(note)
    return f"refused ({notes.index(note) + 1})"


def block(text: str) -> str:
    """Returns the text between the page's marks."""
    found = re.search(r"<!-- conformance -->\n(.*?)\n<!-- /conformance -->", text, re.DOTALL)
    assert found, f"{PAGE.name} has no block <!-- conformance --> ... <!-- /conformance -->"
    return found.group(1)


def _try_all(names: Iterable[str]) -> None:
    """Tries the models named (all by default) and writes record and page."""
    torch.set_num_threads(1)
    for model in MODELS:
        if names and model.name not in names:
            continue
        outcomes = {}
        for backend in BACKENDS:
            with tempfile.TemporaryDirectory() as folder:
                outcomes[backend] = try_pair(model, backend, Path(folder))
            print(model.name, backend, outcomes[backend], flush=True)
        seen = (record() if RECORD.exists() else {}) | {model.name: outcomes}
        ordered = {each.name: seen[each.name] for each in MODELS if each.name in seen}
        RECORD.write_text(json.dumps(ordered, indent=1) + "\n")
    if {model.name for model in MODELS} == record().keys():
        text = PAGE.read_text()
        PAGE.write_text(text.replace(block(text), table(record())))


assert conformance_nets  # its import registers the models

if __name__ == "__main__":
    _try_all(sys.argv[1:])
