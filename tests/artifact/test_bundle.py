"""Models as they are deployed: what is in the files, what can become which format, where each is timed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_train import registry
from dist_train.artifact.bundle import Bundle, chosen_models
from dist_train.artifact.deployable import Deployable, deploy_float, deploy_half
from dist_train.artifact.store import read_artifact, write_artifact
from dist_train.errors import ArtifactError
from dist_train.lowering.base import Reference, Written
from dist_train.lowering.comparison import time_models
from dist_train.programs.program import Program, open_program
from dist_train.programs.torchscript import script_bytes
from tests.support.converted_nets import float_net, images


@pytest.fixture(scope="module")
def scripted() -> Deployable:
    """A model whose program is TorchScript; what matters is that nothing but itself can run it."""
    traced = torch.jit.trace(float_net(), images(2), check_trace=False)
    program = Program("torchscript", script_bytes(traced, "none"), {"state_dict.pt": b"tensors"})
    with torch.no_grad():
        return Deployable(name="int8", program=program, outputs=traced(images(4)), call=traced, source=None)


def test_a_program_answers_bitwise_as_its_model_in_memory() -> None:
    for each in (deploy_float(float_net(), images(4)), deploy_half(float_net(), "bf16", images(4))):
        with torch.no_grad():
            assert torch.equal(open_program(each.program)(images(4)), each.outputs)
        assert each.outputs.dtype == torch.float32


def test_the_first_model_is_model_and_the_others_have_their_names(scripted: Deployable) -> None:
    bundle = Bundle("fp32")
    bundle.add(deploy_float(float_net(), images(4)))
    bundle.add(scripted)
    assert set(bundle.files) == {"model.pt2", "model.int8.ts", "state_dict.pt"}
    entry = bundle.models["int8"]
    assert (entry["file"], entry["kind"], entry["extra"]) == ("model.int8.ts", "torchscript", ["state_dict.pt"])
    assert entry["extra_usage"].keys() == {"state_dict.pt"}
    assert bundle.files["state_dict.pt"] == b"tensors"


def test_what_an_earlier_export_wrote_is_kept(tmp_path) -> None:
    fields = {
        "task": "classification",
        "input": {"shape": [None, 3, 16, 16], "dtype": "float32"},
        "normalization": None,
        "classes": [],
        "ranges_sha256": None,
        "world_sizes": [1],
        "metrics": {},
    }
    first = Bundle("fp32")
    first.add(deploy_float(float_net(), images(4)))
    first.files["model.onnx"] = b"earlier"
    first.models["fp32"]["formats"] = {"onnx": {"files": ["model.onnx"]}}
    write_artifact(tmp_path / "export", first.files, {**fields, "models": first.models, "default": "fp32"})
    manifest, files = read_artifact(tmp_path / "export")
    second = Bundle(manifest["default"], manifest["models"], files)
    second.add(deploy_half(float_net(), "fp16", images(4)))
    second.add(deploy_float(float_net(), images(4)))
    assert set(second.files) == {"model.pt2", "model.onnx", "model.fp16.pt2"}
    assert second.models["fp32"]["formats"] == {"onnx": {"files": ["model.onnx"]}}


@pytest.mark.parametrize("name", ["onnx", "openvino", "executorch"])
def test_torchscript_becomes_no_other_format_and_it_is_said_what_does(scripted: Deployable, name: str) -> None:
    with pytest.raises(ArtifactError, match=f"TorchScript, of which {name} cannot be written(.|\n)*--qat.backend pt2e"):
        Bundle("int8").add_format(scripted, name, images(4), 1)


def test_a_format_that_answers_wrongly_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(model: nn.Module, example: torch.Tensor, threads: int) -> Written:
        return Written({"bad": b""}, lambda batch: model(batch) * (1 if len(batch) > 1 else -1), "bad 1.0", "never")

    monkeypatch.setitem(registry.export_formats._entries, "bad", registry.Entry(write))
    bundle, each = Bundle("fp32"), deploy_float(float_net(), images(4))
    bundle.add(each)
    with pytest.raises(ArtifactError, match=r"fp32 as bad is wrong: bad 1\.0 answers differently \(2 of"):
        bundle.add_format(each, "bad", images(4), 1)
    assert set(bundle.files) == {"model.pt2"}


def test_a_model_that_cannot_be_traced_says_why() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3)) if x.sum().item() > 0 else x.amax((2, 3))

    with pytest.raises(ArtifactError, match=r"torch\.export cannot trace Branching: "):
        deploy_float(Branching(), images(4))


@pytest.mark.parametrize(
    ("wanted", "half", "converted", "expected"),
    [
        (None, None, False, ["fp32"]),
        (None, "bf16", False, ["bf16"]),
        (None, "bf16", True, ["int8"]),
        (["half", "fp32"], "fp16", True, ["fp16", "fp32"]),
        (["fp32", "fp32", "int8"], None, True, ["fp32", "int8"]),
    ],
)
def test_which_models_are_exported(
    wanted: list[str] | None, half: str | None, converted: bool, expected: list[str]
) -> None:
    assert chosen_models(wanted, half, converted) == expected


def test_torchscript_is_timed_as_it_is_and_the_float_model_traced_beside_it(scripted: Deployable) -> None:
    net = float_net()
    times, runtimes = time_models({"fp32": Reference(call=net, source=net), "int8": scripted}, images, [1, 2], 1)
    assert runtimes == {"fp32": "torchscript", "int8": "torchscript"}
    assert {name: set(each) for name, each in times.items()} == {"fp32": {"1", "2"}, "int8": {"1", "2"}}
