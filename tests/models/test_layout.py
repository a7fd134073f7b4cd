"""All ranks build one model, and each buffer can be loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dist_train.config.data import ModelConfig
from dist_train.distributed.world import World
from dist_train.errors import ModelError
from dist_train.models.build import build_model
from dist_train.models.layout import own_memory, require_one_layout
from dist_train.registry import models
from tests.support.ranks import call


def test_a_buffer_whose_elements_share_memory_gets_its_own() -> None:
    model = nn.BatchNorm1d(8)
    model.register_buffer("scale", torch.ones(1).expand(8))
    own_memory(model)
    model.load_state_dict({**model.state_dict(), "scale": torch.arange(8.0)})
    assert torch.equal(model.get_buffer("scale"), torch.arange(8.0))


def unlike(world: World, kind: str) -> str:
    model = nn.Sequential(nn.Linear(3, 2 + (world.rank if kind == "shape" else 0)))
    if kind == "more" and world.rank:
        model.append(nn.Linear(2, 2))
    model.to(torch.float64 if kind == "dtype" and world.rank else torch.float32)
    try:
        require_one_layout(model, world)
    except ModelError as error:
        return error.message
    return ""


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("equal", ""),
        ("shape", "0.weight is [2, 3] float32 on rank 0 and [3, 3] float32 on rank 1"),
        ("more", "1.weight is missing on rank 0 and [2, 2] float32 on rank 1"),
        ("dtype", "0.weight is [2, 3] float32 on rank 0 and [2, 3] float64 on rank 1"),
    ],
)
def test_another_model_on_a_rank_is_named_on_all(kind: str, said: str) -> None:
    found = call(2, "tests.models.test_layout:unlike", kind)
    assert found[0] == found[1] and found[0].endswith(said) and bool(found[0]) == bool(said)


@pytest.mark.parametrize(("given", "said"), [(None, "a NoneType"), (nn.Linear, "the class Linear")])
def test_what_is_no_module_is_refused(given: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models._entries, "planted", type(models.entry("mlp"))(lambda: given))
    with pytest.raises(ModelError, match=f"planted returns {said}, not a torch.nn.Module"):
        build_model(ModelConfig.model_construct(name="planted", args={}), 2, 3)
