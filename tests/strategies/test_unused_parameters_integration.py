"""Parameters that a step does not use: what trains on one rank trains on any number, with the same result."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dist_train
from dist_train.distributed.world import World
from dist_train.training.loop import fit
from tests.support.ranks import call, train
from tests.support.training_loops import CLASSES, flat, make


class Experts(nn.Module):
    """Sends each image to one of three layers by its brightness, so that many steps leave one out; `old` is unused."""

    def __init__(self, num_classes: int = CLASSES, pixels: int = 16) -> None:
        super().__init__()
        self.old = nn.Linear(pixels, 5)
        self.experts = nn.ModuleList(nn.Linear(pixels, num_classes) for _ in range(3))
        self._classes = num_classes

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        outputs, chosen = x.new_zeros(len(x), self._classes), (x.mean(1) > 0.4).int() + (x.mean(1) > 0.93).int()
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                outputs = outputs.index_add(0, rows, expert(x[rows]))
        return outputs


def trained(world: World, micro: int | None) -> dict[str, Any]:
    """Trains with momentum and decay, which would change parameters with gradients of 0."""
    torch.manual_seed(3)
    model = Experts()
    before = copy.deepcopy(model)
    optim = {"lr": 0.1, "weight_decay": 0.1, "decay_norm_and_bias": True}
    made = make(world, model, micro=micro, config={"optim": optim})
    made.run.strategy.find_unused_parameters = True
    used = [0, 0, 0]
    for expert, layer in enumerate(model.experts):
        layer.register_forward_hook(lambda *_, expert=expert: used.__setitem__(expert, used[expert] + 1))
    losses = fit(made.run, None) and made.recorder.of("loss")
    return {"losses": losses, "parameters": flat(model), "old": flat(model.old) == flat(before.old), "used": used}


def everything(world: World) -> list[Any]:
    return [trained(world, micro) for micro in (None, 2)]


@pytest.mark.slow
def test_layers_that_some_steps_or_ranks_do_not_use_train_as_on_one_rank() -> None:
    alone = everything(World())
    # 8 steps and 2 evaluations of 3 batches.
    assert 0 < min(alone[0]["used"]) < 14, "some steps use an expert, others do not"
    answers = [alone, *call(2, f"{__name__}:everything"), *call(3, f"{__name__}:everything")]
    for answer in answers:
        for each in answer:
            assert each["losses"] == pytest.approx(alone[0]["losses"], abs=1e-5)
            assert each["parameters"] == pytest.approx(alone[0]["parameters"], abs=1e-5)
            assert each["old"], "no decay of what has no gradient"


# ---- whole runs ----


class _Middle(nn.Module):
    """Has a layer too many, `old`, and one that rank 1 leaves out once: at the third step, if `rarely`."""

    def __init__(self, num_classes: int, in_channels: int, rarely: bool) -> None:
        super().__init__()
        self.first, self.middle = nn.Conv2d(in_channels, 4, 3), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, num_classes)
        if not rarely:
            self.old = nn.Linear(4, 5)
        self.register_buffer("steps", torch.tensor(0))
        self._rarely = rarely

    def forward(self, x: Tensor) -> Tensor:
        steps, x = self.get_buffer("steps"), self.first(x).relu()
        if not (self._rarely and self.training and torch.distributed.get_rank() == 1 and int(steps) == 2):
            x = x + self.middle(x).relu()
        if self.training:
            steps.add_(1)
        outputs: Tensor = self.head(x.mean((2, 3)))
        return outputs


@dist_train.register_model("rarely_middle")
def rarely_middle(num_classes: int, in_channels: int) -> nn.Module:
    return _Middle(num_classes, in_channels, rarely=True)


@pytest.fixture
def config(tmp_path: Path) -> list[str]:
    tree = {
        "run": {"dir": str(tmp_path / "run"), "threads_per_rank": 1, "device": "cpu"},
        "data": {
            "name": "fake",
            "args": {"num_train": 64, "num_eval": 16, "num_classes": 3, "channels": 1, "height": 8, "width": 8},
            "cache_dir": str(tmp_path / "cache"),
            "global_batch_size": 16,
        },
        "model": {"name": "rarely_middle"},
        "stages": ["train"],
        "train": {"epochs": 1, "optim": {"lr": 0.01}},
    }
    path = tmp_path / "unused.yaml"
    path.write_text(json.dumps(tree))
    return ["run", str(path), "--import", __name__]


@pytest.mark.slow
def test_a_layer_that_set_up_saw_used_and_one_rank_leaves_out_later_is_named(config: list[str]) -> None:
    with train(2, *config) as ranks:
        codes = ranks.wait(100)
        assert codes[1] == 78 and codes[0] != 0, ranks.printed()
        said = "a step on rank 1 did not use the parameters middle.weight, middle.bias, as others did"
        assert said in ranks.output(1) and "-> --find_unused_parameters true" in ranks.output(1), ranks.printed()
        assert said in ranks.output(0) and "Traceback" not in ranks.printed()
    with train(2, *config, "--find_unused_parameters", "true") as ranks:
        assert ranks.wait(100) == [0, 0], ranks.printed()


@dist_train.register_model("layer_too_many")
def layer_too_many(num_classes: int, in_channels: int) -> nn.Module:
    return _Middle(num_classes, in_channels, rarely=False)


class _LayerDrop(_Middle):
    """Drops its middle layer at random in training, each rank by itself."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        if not self.training or float(torch.rand(())) < 0.5:
            x = x + self.middle(x).relu()
        outputs: Tensor = self.head(x.mean((2, 3)))
        return outputs


@dist_train.register_model("layer_drop")
def layer_drop(num_classes: int, in_channels: int) -> nn.Module:
    return _LayerDrop(num_classes, in_channels, rarely=True)


@pytest.mark.parametrize("model", ["layer_too_many", "layer_drop"])
@pytest.mark.slow
def test_auto_looks_where_set_up_finds_some_and_false_refuses_them(model: str, config: list[str]) -> None:
    named = "old.weight, old.bias" if model == "layer_too_many" else "middle.weight, middle.bias"
    with train(2, *config, "--model.name", model, "--find_unused_parameters", "false") as ranks:
        assert ranks.wait(100) == [78, 78], ranks.printed()
        said = f"some steps do not use 2 parameters: {named}, and find_unused_parameters is false"
        assert said in ranks.output(0) and "-> --find_unused_parameters auto" in ranks.output(0), ranks.printed()
    with train(2, *config, "--model.name", model) as ranks:
        assert ranks.wait(100) == [0, 0], ranks.printed()
        assert ranks.output(0).count("auto: train looks for unused parameters in every step") == 1
        assert named in ranks.output(0)
