"""A program with operators of another library is opened where they are named, and nowhere else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

import dist_train
from dist_train.cli import main
from dist_train.errors import ArtifactError
from dist_train.programs import operators
from dist_train.run_dir.files import read_json
from tests.support.small_runs import Runs

OPERATOR = "torchvision::deform_conv2d"
TRUST = json.dumps({OPERATOR: "torchvision"})
WORDS = ("--model.name", "deformed_for_test", "--model.args", "{}", "--train.epochs", "1")


@dist_train.register_model("deformed_for_test")
class Deformed(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem, self.offsets = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 18, 3, padding=1)
        self.moved, self.head = DeformConv2d(4, 4, 3, padding=1), nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        outputs: Tensor = self.head(self.moved(x, 0.1 * self.offsets(x)).relu().mean((2, 3)))
        return outputs


@pytest.fixture(autouse=True)
def nothing_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_trusted", {})


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pt2e", "fx"])
def test_a_program_is_opened_where_its_operators_are_named(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(tmp_path)
    stages = ("--stages", "[train, qat, convert, export]", "--qat.epochs", "1", "--convert.runtime", "none")
    words = (*WORDS, *stages, "--qat.backend", backend, "--export.latency", "false")
    assert runs("refused", *words) == 78
    said = capsys.readouterr().err
    assert f"moved calls {OPERATOR}" in said and "--export.operators" in said
    assert runs("run", *words, "--export.operators", TRUST, "--convert.agreement_bound", "0.5") == 0
    manifest = read_json(tmp_path / "run" / "export" / "manifest.json")
    assert "import torchvision; " in manifest["models"]["int8"]["usage"]

    monkeypatch.setattr(operators, "_trusted", {})
    with pytest.raises(ArtifactError, match=f"holds the operator '{OPERATOR}'") as caught:
        dist_train.load_artifact(tmp_path / "run")
    assert f'operators={{"{OPERATOR}": "MODULE"}}' in caught.value.hint
    model, _ = dist_train.load_artifact(tmp_path / "run", operators={OPERATOR: "torchvision"})
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 6)


def test_a_module_that_does_not_help_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    for module, said in (("no_such_module", "cannot be imported"), ("json", "does not register the operator")):
        assert runs("run", "--export.operators", json.dumps({"mine::op": module})) == 78
        error = capsys.readouterr().err
        assert "export.operators" in error and f"the module {module}" in error and said in error
    assert main(["predict", str(tmp_path), "x.png", "--trust", "mine"]) == 78
    assert "--trust takes OPERATOR=MODULE" in capsys.readouterr().err


@pytest.mark.parametrize("operator", ["aten::from_file", "aten::save"])
def test_operators_of_files_are_refused_though_they_are_named(operator: str, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import tests.programs.test_crafted_programs as crafted\n"
        "from dist_train.programs.operators import trust_operators\n"
        f"trust_operators({{{operator!r}: 'torch'}})\n"
        "from dist_train.programs.pt2 import export_program, program_bytes\n"
        "program = program_bytes(export_program(crafted._Net().eval(), crafted.INPUTS))\n"
        "crafted.test_a_graph_that_opens_a_file_is_refused_and_torch_would_run_it(Path(sys.argv[1]), program)\n"
    )
    done: Any = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
