"""A model that the backend cannot convert ends the run at set-up, on every rank, before float training."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch import Tensor, nn

import dist_train
from dist_train.errors import EXIT_CONFIG
from dist_train.quantization.torch_ao.fx import FXBackend
from dist_train.run_dir.files import read_json
from dist_train.run_dir.paths import RunDir
from tests.support import conformance_nets
from tests.support import one_net_all_backends as stub_parts
from tests.support.ranks import train
from tests.support.small_runs import Runs

assert conformance_nets and stub_parts  # their imports register models
STAGES = ["--stages", "[train, ptq, qat, convert]", "--train.epochs", "1", "--qat.epochs", "1"]
BRANCH = ["--model.name", "branch_on_data", "--model.args", "{}"]
WHERE = r"_Branching, conformance_nets.py line \d+: if x.mean() > 0: ".replace("()", r"\(\)")


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def said(runs: Runs, name: str) -> str:
    """Returns the error in status.json, and checks that no step was made."""
    run_dir = RunDir(runs.folder / name)
    assert not run_dir.metrics.exists() or "loss" not in run_dir.metrics.read_text()
    assert not run_dir.results.exists()
    status = read_json(run_dir.status)
    assert status is not None and status["state"] == "failed"
    return str(status["error"])


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("pt2e", BRANCH, f"torch.export cannot trace {WHERE}"),
        ("fx", BRANCH, f"torch.fx cannot trace {WHERE}"),
        ("eager", ["--model.name", "on_one_pixel", "--model.args", "{}"], r"on inputs \[1, 8, 8\]: required rank 4"),
    ],
)
def test_the_run_ends_before_the_first_step_with_the_place_and_what_to_type(
    backend: str, options: list[str], message: str, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs("run", *STAGES, *options, "--qat.backend", backend) == EXIT_CONFIG
    printed = capsys.readouterr().err
    assert ("torch.where" if options == BRANCH else "--qat.backend ") in printed.partition("->")[2]
    assert "Traceback" not in printed
    assert re.search(message, said(runs, "run"))


@pytest.mark.parametrize(
    ("rules", "message", "hint"),
    [
        ("[{match: '*', skip: true}]", "has nothing that can be quantized", "remove rules that skip too much"),
        ("[{match: {type: ReLU}, activation: {bits: 4}}]", "{type: ReLU} changes nothing", "match a convolution"),
        (
            "[{match: {type: ReLU}, skip: true}]",
            "{type: ReLU} changes nothing",
            "match the convolution or Linear before",
        ),
    ],
)
def test_pt2e_finds_rules_without_effect_before_the_first_step(
    rules: str, message: str, hint: str, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs("run", *STAGES, "--qat.rules", rules) == EXIT_CONFIG
    assert hint in capsys.readouterr().err.partition("->")[2]
    assert message in said(runs, "run")


@pytest.mark.slow
def test_every_rank_ends_by_itself_with_78(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    command = ["run", str(runs.config), "--run.dir", str(tmp_path / "run"), *STAGES, *BRANCH]
    with train(2, *command, "--import", "tests.support.conformance_nets") as ranks:
        assert ranks.wait() == [EXIT_CONFIG, EXIT_CONFIG], ranks.printed()
        for rank in (0, 1):
            assert "_Branching, conformance_nets.py line" in ranks.output(rank)
    said(runs, "run")


@dist_train.register_model("on_one_pixel")
def on_one_pixel(num_classes: int, in_channels: int) -> nn.Module:
    """Returns a net with stubs that averages maps of one pixel, from images of 8 x 8."""

    class OnOnePixel(stub_parts.StubNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, :, :1, :1])

    return OnOnePixel(num_classes, in_channels)


class _Asked(FXBackend):
    examples: list[list[int] | None] = []

    def check(self, model: nn.Module, rules: object = (), example: Tensor | None = None) -> None:
        self.examples.append(None if example is None else list(example.shape))
        super().check(model, (), example)


@pytest.fixture
def asked() -> type[_Asked]:
    _Asked.examples = []
    return _Asked


@dist_train.register_quantization_backend("asked")
def make_asked() -> _Asked:
    return _Asked()


@pytest.mark.slow
def test_a_resume_is_not_tried_again(asked: type[_Asked], runs: Runs) -> None:
    options = [*STAGES, "--qat.backend", "asked", "--checkpoint.every_steps", "2"]
    assert runs("run", *options, interrupt_at=5) == -1
    assert runs("run", *options, "--task.name", "interruptible") == 0
    assert asked.examples == [[2, 1, 8, 8], None]
