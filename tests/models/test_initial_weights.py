"""Trained weights to start from: by name, from a file and from another run; other heads and channels; errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from torch import nn

import dist_train
from dist_train.config.data import ModelConfig
from dist_train.config.tree import Config
from dist_train.errors import ConfigError, DataError
from dist_train.models.build import build_model, check_model, initial_weights
from dist_train.models.weight_files import read_file
from dist_train.models.weights import digest, load_weights, read_run
from dist_train.pipeline.arguments import check_arguments
from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.files import read_json
from tests.support.versions import NEEDS_PT2E

SMALL = {"name": "small_resnet", "args": {"width": 4, "blocks": 2}}


def small(num_classes: int = 5, in_channels: int = 3, seed: int = 0, **args: int) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(
        ModelConfig.model_validate({**SMALL, "args": {**SMALL["args"], **args}}), num_classes, in_channels
    )


def same(left: nn.Module, right: nn.Module, but: tuple[str, ...] = ()) -> bool:
    """True where these entries differ and all others are equal."""
    other = right.state_dict()
    return {name for name, value in left.state_dict().items() if not torch.equal(value, other[name])} == set(but)


@pytest.mark.parametrize("kind", ["plain.pt", "plain.pth", "file.safetensors", "wrapped.pt", "parallel.pt"])
def test_a_file_of_any_usual_kind_is_loaded(kind: str, tmp_path: Path) -> None:
    trained, fresh, path = small(), small(seed=1), tmp_path / kind
    if kind == "file.safetensors":
        save_model(trained, str(path))
    else:
        state: Any = trained.state_dict()
        if kind == "parallel.pt":
            state = {f"module.{name}": value for name, value in state.items()}
        torch.save({"model": state, "epoch": 3} if kind == "wrapped.pt" else state, path)
    assert load_weights(fresh, read_file(path), kind, num_outputs=5) == []
    assert same(fresh, trained)


def test_a_head_of_another_width_stays_new_and_that_is_said() -> None:
    trained, fresh, untouched = small(7), small(5, seed=1), small(5, seed=1)
    assert load_weights(fresh, trained.state_dict(), "old.pt", num_outputs=5) == [
        "the head head is new: 5 outputs, 7 in old.pt"
    ]
    assert torch.equal(fresh.get_parameter("head.weight"), untouched.get_parameter("head.weight"))
    assert torch.equal(fresh.get_parameter("head.bias"), untouched.get_parameter("head.bias"))
    assert torch.equal(fresh.get_parameter("stem.0.weight"), trained.get_parameter("stem.0.weight"))


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 6])
def test_the_first_convolution_is_fitted_to_other_channels(channels: int) -> None:
    trained, fresh = small().eval(), small(in_channels=channels, seed=1).eval()
    (note,) = load_weights(fresh, trained.state_dict(), "rgb.pt", num_outputs=5)
    assert note == f"the first convolution stem.0 is fitted to {channels} channels, 3 in rgb.pt"
    gray = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(fresh(gray.expand(-1, channels, -1, -1)), trained(gray.expand(-1, 3, -1, -1)))


def test_a_wrong_shape_names_the_layer_and_both_shapes() -> None:
    fresh, untouched = small(seed=1), small(seed=1)
    with pytest.raises(DataError) as caught:
        load_weights(fresh, small(width=6).state_dict(), "wide.pt", num_outputs=5)
    assert caught.value.message.startswith(
        "wide.pt does not fit the model: stem.0.weight is [6, 3, 3, 3] there, [4, 3, 3, 3] in the model; "
        "stem.1.weight is [6]"
    )
    assert "more" in caught.value.message and caught.value.hint
    assert same(fresh, untouched), "nothing was loaded"


ODD = {
    "sparse (sparse_coo)": lambda weight: weight.to_sparse(),
    "sparse (sparse_csr)": lambda weight: weight.flatten(1).to_sparse_csr(),
    "a nested tensor": lambda weight: torch.nested.nested_tensor([weight[0, 0], weight[1, 0]]),
    "on the meta device, without values": lambda weight: weight.to("meta"),
    "quantized (qint8)": lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
    "quantized (quint8)": lambda weight: torch.quantize_per_channel(
        weight, torch.full((len(weight),), 0.1), torch.zeros(len(weight)), 0, torch.quint8
    ),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("kind", ODD)
def test_a_tensor_that_is_no_dense_array_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    state, path = small().state_dict(), tmp_path / "odd.pt"
    name = next(name for name, value in state.items() if value.dim() == 4)
    torch.save(state | {name: ODD[kind](state[name].clone())}, path)
    with pytest.raises(DataError) as caught:
        load_weights(small(seed=1), read_file(path), "odd.pt", num_outputs=5)
    assert f"odd.pt holds a tensor that cannot be loaded: {name} is {kind}" in caught.value.message
    assert "model.state_dict()" in caught.value.hint


@pytest.mark.parametrize(
    ("dtype", "numbers"),
    [
        (torch.int64, "integers (int64)"),
        (torch.int8, "integers (int8)"),
        (torch.bool, "integers (bool)"),
        (torch.complex64, "complex numbers (complex64)"),
    ],
)
def test_numbers_of_another_kind_than_the_models_are_refused(dtype: torch.dtype, numbers: str) -> None:
    state = small().state_dict()
    with pytest.raises(DataError) as caught:
        load_weights(small(seed=1), state | {"head.weight": state["head.weight"].to(dtype)}, "odd.pt", num_outputs=5)
    said = f"odd.pt does not fit the model: head.weight is {numbers} there, floats (float32) in the model"
    assert caught.value.message == said and "float()" in caught.value.hint


def test_a_buffer_of_another_kind_is_taken_where_its_values_stay() -> None:
    trained, fresh = small(), small(seed=1)
    counts = {name: value for name, value in trained.state_dict().items() if name.endswith("num_batches_tracked")}
    assert counts
    load_weights(fresh, trained.state_dict() | {name: value.half() for name, value in counts.items()}, "half.pt", 5)
    assert same(fresh, trained)
    with pytest.raises(DataError, match="floats .float32. there, integers .int64. in the model"):
        load_weights(fresh, trained.state_dict() | {name: torch.tensor(0.5) for name in counts}, "odd.pt", 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floats_of_another_width_are_taken(dtype: torch.dtype) -> None:
    state = {name: value.to(dtype) if value.dim() else value for name, value in small().state_dict().items()}
    fresh = small(seed=1)
    assert load_weights(fresh, state, "wide.pt", num_outputs=5) == []
    assert torch.equal(fresh.state_dict()["head.weight"], state["head.weight"].float())


def test_a_weight_that_float32_cannot_hold_is_refused() -> None:
    state = small().state_dict()
    with pytest.raises(DataError, match="head.weight has NaN or inf"):
        load_weights(small(), state | {"head.weight": state["head.weight"].double() * 1e300}, "wide.pt", num_outputs=5)


def test_a_layer_of_the_heads_width_that_is_no_head_is_not_replaced() -> None:
    fresh = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 3))
    with pytest.raises(DataError, match=r"0.weight is \[6, 8\] there, \[5, 8\] in the model; 0.bias is"):
        load_weights(fresh, nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)).state_dict(), "x.pt", num_outputs=5)


def test_names_that_are_missing_or_unknown_are_listed() -> None:
    other = nn.ModuleDict({"other": nn.Linear(2, 2)})
    with pytest.raises(DataError) as caught:
        load_weights(nn.Sequential(nn.Linear(2, 2)), other.state_dict(), "x.pt", num_outputs=2)
    assert caught.value.message == (
        "x.pt is of another model: it lacks 0.weight, 0.bias and has besides other.weight, other.bias"
    )


def test_a_file_that_holds_no_weights_is_refused(tmp_path: Path) -> None:
    whole, text, numbers = tmp_path / "whole.pt", tmp_path / "text.safetensors", tmp_path / "numbers.pt"
    torch.save(nn.Linear(2, 2), whole)  # a pickled module: code
    text.write_text("no tensors")
    torch.save({"lr": 0.1}, numbers)
    for path in (whole, text, numbers):
        with pytest.raises(DataError, match=path.name) as caught:
            read_file(path)
        assert "torch.save(model.state_dict(), FILE)" in caught.value.hint


def test_the_digest_is_the_content() -> None:
    state = small().state_dict()
    assert digest(state) == digest(dict(reversed(state.items())))
    changed = {name: value.clone() for name, value in state.items()}
    changed["head.bias"][0] += 1e-3
    assert digest(changed) != digest(state)


@pytest.mark.parametrize(
    ("model", "said", "hint"),
    [
        ({**SMALL, "weights": "DEFAULT"}, "has no weights by name", ".safetensors"),
        ({"name": "resnet18", "weights": "IMAGENET"}, "has no weights 'IMAGENET'", "IMAGENET1K_V1"),
        ({**SMALL, "weights": "not/there.pt"}, "not/there.pt does not exist", ".safetensors"),
        ({**SMALL, "init_from": "runs/not_there"}, "is not a run directory", "runs/NAME"),
    ],
)
def test_weights_that_are_not_there_are_mistakes_of_the_configuration(
    model: dict[str, Any], said: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_arguments(Config.model_validate({"model": model, "run": {"dir": "runs/no_such_run"}}))
    (problem,) = caught.value.problems
    assert problem.place.startswith("model.") and said in problem.message and hint in problem.hint


def test_named_weights_that_cannot_be_downloaded_say_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A proxy that nobody listens at: no network, wherever the test runs.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    found = initial_weights(ModelConfig(name="resnet18", weights="IMAGENET1K_V1"))
    assert found is not None and found[0] == "IMAGENET1K_V1 of resnet18"
    with pytest.raises(DataError, match="cannot download the weights of resnet18") as caught:
        found[1]()
    assert "--model.weights FILE" in caught.value.hint and str(tmp_path) in caught.value.hint


def test_named_weights_come_out_of_torch_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that a download would have left: a thousand classes, RGB; the model has ten, gray."""
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1
    trained = torchvision.models.shufflenet_v2_x0_5()
    file = tmp_path / "hub" / "checkpoints" / Path(weights.url).name
    file.parent.mkdir(parents=True)
    torch.save(trained.state_dict(), file)
    config = ModelConfig(name="shufflenet_v2_x0_5", weights="DEFAULT")
    check_model(config)
    found = initial_weights(config)
    assert found is not None
    model = build_model(config, 10, 1)
    assert len(load_weights(model, found[1](), found[0], 10)) == 2
    assert same_but_ends(model, trained)


def same_but_ends(model: nn.Module, trained: nn.Module) -> bool:
    own = trained.state_dict()
    changed = {name for name, value in model.state_dict().items() if value.shape != own[name].shape}
    equal = all(torch.equal(value, own[name]) for name, value in model.state_dict().items() if name not in changed)
    return equal and changed == {"conv1.0.weight", "fc.weight", "fc.bias"}


# ---- whole runs ----


def config(folder: Path, name: str, **more: Any) -> Config:
    args = {"num_train": 60, "num_eval": 20, "num_classes": 3, "channels": 1, "height": 8, "width": 8}
    tree = {
        "run": {"name": name, "dir": str(folder / name), "threads_per_rank": 1, "device": "cpu"},
        "data": {"name": "fake", "args": args, "cache_dir": str(folder / "cache"), "global_batch_size": 20},
        "model": SMALL,
        "train": {"epochs": 1, "optim": {"lr": 1e-30}},
        "stages": ["train"],
        **more,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(tree))
    return dist_train.load_config(path)


def weights_of(run: Path) -> torch.Tensor:
    state: dict[str, torch.Tensor] = CheckpointFolder(run / "checkpoints").load("train-end")["payload"]["model"]
    return state["head.weight"]


@pytest.mark.heavy
def test_a_run_starts_from_the_model_of_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dist_train.run(config(tmp_path, "first", run={"name": "first", "dir": str(tmp_path / "first"), "seed": 1}))
    model = {**SMALL, "init_from": str(tmp_path / "first")}
    second = config(tmp_path, "second", model=model)
    results = dist_train.run(second)
    assert f"model: starts from the run {tmp_path / 'first'}" in capsys.readouterr().out
    torch.testing.assert_close(weights_of(tmp_path / "second"), weights_of(tmp_path / "first"))
    assert results["initial_weights"]["sha256"] == digest(read_run(tmp_path / "first"))

    # Begun with training, it holds its model itself: the other run may go.
    (tmp_path / "first").rename(tmp_path / "gone")
    (tmp_path / "second" / "status.json").write_text('{"state": "failed", "stage": "train", "step": 0, "restarts": 0}')
    assert dist_train.run(second)["initial_weights"] == results["initial_weights"]
    with pytest.raises(ConfigError, match="is not a run directory"):
        dist_train.run(config(tmp_path, "third", model=model))
    with pytest.raises(DataError, match="has no trained float model"):
        read_run(tmp_path / "third")


@pytest.mark.heavy
@NEEDS_PT2E
def test_quantization_without_training_is_not_resumed_from_other_weights(tmp_path: Path) -> None:
    file = tmp_path / "trained.pt"
    torch.save(small(3, 1).state_dict(), file)
    more = {"model": {**SMALL, "weights": str(file)}, "stages": ["ptq"], "ptq": {"samples": 40}}
    results = dist_train.run(config(tmp_path, "ptq", **more))
    assert results["initial_weights"] == {"source": str(file), "sha256": digest(small(3, 1).state_dict())}
    assert read_json(tmp_path / "ptq" / "results.json")["initial_weights"] == results["initial_weights"]
    # As if it had been killed before its end.
    (tmp_path / "ptq" / "status.json").write_text('{"state": "failed", "stage": "ptq", "step": 0, "restarts": 0}')
    torch.save(small(3, 1, seed=2).state_dict(), file)
    with pytest.raises(DataError, match=r"trained.pt has changed since this run began"):
        dist_train.run(config(tmp_path, "ptq", **more))
    torch.save(small(3, 1).state_dict(), file)
    assert dist_train.run(config(tmp_path, "ptq", **more))["models"] == results["models"]
