"""torch's attention in single operations computes the same, under the same names, and becomes int8."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_train.programs.program import open_program
from dist_train.quantization.attention import OpenAttention, open_attention
from dist_train.quantization.int8_share import int8_share
from tests.support.attention_nets import NETS, net
from tests.support.one_net_all_backends import backend
from tests.support.tiny_nets import calibrate

B, L, S, E, HEADS = 2, 5, 7, 8, 4
PADDING = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
CAUSAL = torch.triu(torch.ones(L, S, dtype=torch.bool), 2)
PER_HEAD = torch.randn(B * HEADS, L, S, generator=torch.Generator().manual_seed(0))
MASKS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "padding": {"key_padding_mask": PADDING},
    "added-padding": {"key_padding_mask": PADDING * -3.0},
    "causal": {"attn_mask": CAUSAL},
    "added": {"attn_mask": CAUSAL * -2.0},
    "per-head": {"attn_mask": PER_HEAD},
    "forbidden-per-head": {"attn_mask": PER_HEAD > 1.5},
    "both": {"attn_mask": CAUSAL, "key_padding_mask": PADDING},
}


def opened(module: nn.Module) -> nn.Module:
    found = copy.deepcopy(module)
    open_attention(found)
    return found


def require_equal(module: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Compares outputs with torch's slow path and its fast one, and the gradients of all parameters, by name."""
    ours = opened(module)
    module.zero_grad()
    assert type(ours) is not type(module) and ours.state_dict().keys() == module.state_dict().keys()
    results = [each(*args, **kwargs) for each in (module, ours)]
    pairs = [result if isinstance(result, tuple) else (result, None) for result in results]
    for one, other in zip(*pairs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(other, one, atol=2e-6, rtol=1e-5)
    gradients = []
    for each, (output, _) in zip((module, ours), pairs, strict=True):
        (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in each.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        fast, result = module(*args, **kwargs), ours(*args, **kwargs)
    torch.testing.assert_close(result, fast, atol=2e-6, rtol=1e-5)


def attention(**settings: Any) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(E, HEADS, **settings).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5)  # biases begin as zeros
    return module


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str, batch_first: bool, weights: bool) -> None:
    query, key = torch.randn(B, L, E), torch.randn(B, S, E)
    if not batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    require_equal(attention(batch_first=batch_first), query, key, key, need_weights=weights, **MASKS[mask])


@pytest.mark.parametrize(
    "settings", [{}, {"bias": False}, {"kdim": 3, "vdim": 6}, {"kdim": 3, "vdim": 6, "bias": False}], ids=str
)
def test_keys_and_values_of_their_own(settings: dict[str, Any]) -> None:
    query, key, value = torch.randn(B, L, E), torch.randn(B, S, settings.get("kdim", E)), torch.randn(B, S, 6)
    value = value if "vdim" in settings else torch.randn(B, S, E)
    require_equal(attention(batch_first=True, **settings), query, key, value, average_attn_weights=False)


@pytest.mark.parametrize("batch_first", [False, True])
def test_one_tensor_for_all_three_with_and_without_a_batch(batch_first: bool) -> None:
    for x in (torch.randn(B, L, E), torch.randn(L, E)):
        for weights in (False, True):
            require_equal(attention(batch_first=batch_first), x, x, x, need_weights=weights)


def test_dropout_is_on_in_training() -> None:
    x, module = torch.randn(B, 40, E), opened(attention(batch_first=True, dropout=0.5)).train()
    for weights in (False, True):
        assert not torch.equal(module(x, x, x, need_weights=weights)[0], module(x, x, x, need_weights=weights)[0])


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masks", [{}, {"mask": torch.triu(torch.full((S, S), float("-inf")), 1)}], ids=["", "causal"])
def test_encoders(norm_first: bool, masks: dict[str, Tensor]) -> None:
    layer = nn.TransformerEncoderLayer(E, HEADS, 16, batch_first=True, norm_first=norm_first)
    stack = nn.TransformerEncoder(layer, 2, nn.LayerNorm(E), enable_nested_tensor=False).eval()
    require_equal(stack, torch.randn(B, S, E), **masks)
    require_equal(stack, torch.randn(B, S, E), src_key_padding_mask=PADDING)


def test_decoders() -> None:
    stack = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, HEADS, 16, batch_first=True), 2).eval()
    masks = {"tgt_mask": torch.triu(torch.ones(L, L, dtype=torch.bool), 1), "memory_key_padding_mask": PADDING}
    require_equal(stack, torch.randn(B, L, E), torch.randn(B, S, E), **masks)


def test_what_cannot_be_opened_is_left_as_it_is() -> None:
    class Mine(nn.MultiheadAttention):
        pass

    class Layer(nn.TransformerEncoderLayer):
        pass

    for module in (
        nn.MultiheadAttention(E, HEADS, add_bias_kv=True),
        nn.MultiheadAttention(E, HEADS, add_zero_attn=True),
        Mine(E, HEADS),
        nn.TransformerEncoder(Layer(E, HEADS, 16, batch_first=True), 1),
    ):
        assert type(opened(module)) is type(module)
    stack = opened(nn.TransformerEncoder(Layer(E, HEADS, 16, batch_first=True), 1))
    assert isinstance(stack.get_submodule("layers.0.self_attn"), OpenAttention), "within one, torch's own is"


@pytest.mark.heavy
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("kind", ["pt2e", "fx"])
def test_all_of_its_weights_become_int8(kind: str, name: str) -> None:
    model, images = net(name), torch.randn(64, 3, 8, 8)
    ours = backend(kind)
    ours.check(model, (), images[:2])  # equal outputs and gradients, and conversion
    prepared = ours.prepare(model, images[:2])
    prepared.fake_quantize(False)
    with torch.no_grad():
        torch.testing.assert_close(prepared(images), model(images), atol=1e-5, rtol=1e-5)
    prepared.fake_quantize(True)
    calibrate(prepared, images).eval().observe(False)
    share = int8_share(model, prepared)
    assert share is not None
    assert {name for name in share.left_float if name not in ("body", "body.queries")} == set(), share.in_words()
    with torch.no_grad():
        expected, converted = prepared(images), ours.convert(prepared)
        results = converted(images)
        assert (results - expected).abs().max() < 0.05 * expected.abs().max()
        program = open_program(ours.serialize(converted, images[:2]))
        torch.testing.assert_close(program(images[:3]), results[:3], atol=1e-5, rtol=1e-5)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["pt2e", "fx"])
def test_a_rule_leaves_one_in_floating_point(kind: str) -> None:
    from dist_train.config.stages import RuleConfig

    model, images = net("encoder"), torch.randn(4, 3, 8, 8)
    rule = RuleConfig.model_validate({"match": "body.layers.0.self_attn", "skip": True})
    share = int8_share(model, backend(kind).prepare(model, images, [rule]))
    assert share is not None
    assert set(share.left_float) == {"body.layers.0.self_attn", "body.layers.0.self_attn.out_proj"}
