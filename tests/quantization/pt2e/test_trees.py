"""pt2e on models that take and return trees: prepared, converted, and as programs of other sizes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from dist_train import trees
from dist_train.config.stages import QATConfig
from dist_train.errors import QuantizationError
from dist_train.programs.program import open_program
from dist_train.quantization.backend import build_backend
from dist_train.quantization.gradients import gradient_difference
from dist_train.quantization.int8_share import advise, int8_share
from dist_train.quantization.layer_sqnr import layer_sqnr
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.pt2e.backend import PT2EBackend
from dist_train.quantization.ranges import Ranges
from dist_train.trees import Tree
from tests.support.tree_nets import DYNAMIC, AnsweringNet, DictNet, PairNet, TextNet, batches_of, pairs, seeded, texts

pytestmark = pytest.mark.heavy
NETS = (PairNet, TextNet, DictNet, AnsweringNet)


def example_of(kind: type[nn.Module]) -> Tree:
    return pairs(16) if kind is PairNet else texts(16)


def backend_of(kind: type[nn.Module]) -> PT2EBackend:
    return PT2EBackend(dynamic={} if kind is PairNet else DYNAMIC)


@torch.no_grad()
def calibrated(backend: PT2EBackend, net: nn.Module, rows: Tree) -> PreparedModel:
    """A prepared model with the ranges of `rows`."""
    prepared = backend.prepare(net, rows).eval()
    prepared.fake_quantize(False)
    ranges = Ranges(prepared)
    ranges.drop()
    trees.call(prepared, rows)
    ranges.update(ranges.observed(), averaging=1.0)
    prepared.fake_quantize(True)
    prepared.observe(False)
    return prepared


@torch.no_grad()
def difference(actual: Tree, expected: Tree) -> float:
    found, right = dict(trees.named_leaves(trees.plain(actual))), dict(trees.named_leaves(trees.plain(expected)))
    assert found.keys() == right.keys()
    return max(float((found[name] - right[name]).abs().max() / right[name].abs().max()) for name in right)


@pytest.mark.parametrize("kind", NETS)
def test_a_tree_becomes_int8_for_any_batch_and_length(kind: type[nn.Module]) -> None:
    net, example, backend = seeded(kind), example_of(kind), backend_of(kind)
    before = copy.deepcopy(net.state_dict())
    prepared = calibrated(backend, net, example)
    prepared.fake_quantize(False)
    assert all(difference(trees.call(prepared, each), trees.call(net, each)) < 1e-5 for each in batches_of(net))
    prepared.fake_quantize(True)
    converted = backend.convert(prepared)
    program = open_program(backend.serialize(converted, example))
    for each in batches_of(net):
        with torch.no_grad():
            simulated, integers = trees.call(prepared, each), program(each)
        assert difference(integers, simulated) < 0.05, kind
        assert difference(integers, trees.call(net, each)) < 0.2, kind
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    noise = layer_sqnr(prepared, converted, example)
    assert "head" in noise and all(ratio > 20 or math.isinf(ratio) for ratio in noise.values()), noise


@pytest.mark.parametrize("kind", NETS)
def test_a_tree_trains_as_the_float_model_and_is_tried_at_set_up(kind: type[nn.Module]) -> None:
    net, example, backend = seeded(kind), example_of(kind), backend_of(kind)
    backend.check(net, (), example)
    prepared = backend.prepare(net, example)
    prepared.fake_quantize(False)
    prepared.observe(False)

    def loss(outputs: Tree) -> torch.Tensor:
        return torch.stack([leaf.square().mean() for leaf in trees.leaves(trees.plain(outputs))]).sum()

    worst, lines, dtype = gradient_difference(prepared, net, example, loss)
    assert worst < 1e-6 and dtype is torch.float64, lines
    prepared.train()
    prepared.fake_quantize(True)
    loss(trees.call(prepared, example)).backward()
    assert all(each.grad is not None for each in prepared.parameters())


def test_equal_trees_give_equal_bytes_and_another_process_s_order_of_keys_does_not_matter() -> None:
    backend = backend_of(TextNet)
    net, example = seeded(TextNet), texts(16)
    one, other = (backend.serialize(backend.convert(calibrated(backend, net, example)), example) for _ in range(2))
    assert one.data == other.data
    call, turned = open_program(one), dict(reversed(example.items()))
    assert torch.equal(call(turned), call(example))


def test_a_nested_tree_of_inputs() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = PairNet()

        def forward(self, both: dict[str, torch.Tensor], more: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            outputs: torch.Tensor = self.pair(both["left"] + more[0], more[1])
            return outputs

    (left, right), backend = pairs(16), PT2EBackend()
    example = {"both": {"left": left}, "more": (left, right)}
    prepared = calibrated(backend, Nested().eval(), example)
    program = open_program(backend.serialize(backend.convert(prepared), example))
    five = trees.take(example, slice(5))
    assert difference(program(five), trees.call(prepared, five)) < 0.05


def test_embeddings_stay_in_floating_point_and_that_is_said() -> None:
    net, example = seeded(TextNet), texts(16)
    prepared = PT2EBackend(dynamic=DYNAMIC).prepare(net, example)
    found = int8_share(net, prepared)
    assert found is not None and found.embeddings == {"embedding"}
    assert found.in_words().endswith("float: embedding (800, embedding)")
    said = advise(net, example, QATConfig(), found, DYNAMIC)
    assert said == "embeddings, 800 of them, stay in floating point: they are read, not multiplied"


def test_a_length_that_forward_fixes_is_refused_with_its_name() -> None:
    class Fixed(TextNet):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return super().forward(input_ids.reshape(-1, 7), attention_mask.reshape(-1, 7))

    with pytest.raises(QuantizationError, match=r"torch.export cannot trace"):
        build_backend(QATConfig(), DYNAMIC).prepare(seeded(Fixed), texts(4))


@pytest.mark.long
def test_hugging_face_s_bert_becomes_int8_but_for_its_embeddings_at_any_length() -> None:
    transformers = pytest.importorskip("transformers", reason="only with transformers")
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=64, num_labels=4, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = transformers.BertForSequenceClassification(config).eval()
    example, backend = texts(16), PT2EBackend(dynamic=DYNAMIC)
    backend.check(net, (), example)
    prepared = calibrated(backend, net, example)
    found = int8_share(net, prepared)
    assert found is not None and found.embeddings == found.left_float.keys()
    program = open_program(backend.serialize(backend.convert(prepared), example))
    for each in (texts(1, 7, 1), texts(5, 11, 2), texts(1, 4, 3), texts(3, 64, 4)):
        with torch.no_grad():
            assert difference(program(each), trees.call(prepared, each)) < 0.05
            assert difference(program(each), trees.call(net, each)) < 0.2
