"""The text transformer: padding changes nothing, order does, and all its layers have names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_train.config.data import ModelConfig
from dist_train.errors import ConfigError
from dist_train.models.build import build_model, check_model

ARGS = {"vocabulary": 30, "width": 16, "depth": 2, "heads": 4, "max_length": 20}


def model() -> nn.Module:
    torch.manual_seed(0)
    config = ModelConfig(name="text_transformer", args=ARGS)
    check_model(config)
    return build_model(config, 3, 1).eval()


def inputs(rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 30, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def test_padding_changes_the_outputs_by_rounding_alone() -> None:
    net, short = model(), inputs(4, 7)
    expected = net(**short)
    assert expected.shape == (4, 3)
    for fill in (0, 5):
        long = {
            name: torch.cat([part, torch.full((4, 6), 0 if name == "attention_mask" else fill)], 1)
            for name, part in short.items()
        }
        torch.testing.assert_close(net(**long), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_order_of_tokens_counts_and_so_do_all_of_them() -> None:
    net, given = model(), inputs(2, 7)
    expected = net(**given)
    for place in range(7):
        changed = given["input_ids"].clone()
        changed[:, place] = changed[:, place] % 29 + 1
        assert (net(changed, given["attention_mask"]) - expected).abs().max() > 1e-5
    assert (net(given["input_ids"].flip(1), given["attention_mask"]) - expected).abs().max() > 1e-5


@torch.no_grad()
def test_a_row_of_padding_alone_is_finite() -> None:
    given = inputs(2, 5)
    given["attention_mask"][0] = 0
    assert torch.isfinite(model()(**given)).all()


def test_all_weights_are_in_linear_layers_or_embeddings() -> None:
    net = model()
    held = {id(layer.weight) for layer in net.modules() if isinstance(layer, (nn.Linear, nn.Embedding))}
    assert all(id(parameter) in held for parameter in net.parameters() if parameter.dim() > 1)


def test_a_width_that_the_heads_do_not_divide_is_a_mistake_of_the_configuration() -> None:
    with pytest.raises(ConfigError, match="width 16 is no multiple of heads 3"):
        build_model(ModelConfig(name="text_transformer", args={**ARGS, "heads": 3}), 3, 1)
