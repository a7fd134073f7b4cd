"""fx on models that take several tensors, by position and by keywords."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dist_train import trees
from dist_train.errors import QuantizationError
from dist_train.programs.program import open_program
from dist_train.quantization.ranges import Ranges
from dist_train.quantization.torch_ao.fx import FXBackend
from dist_train.trees import Tree
from tests.quantization.pt2e.test_trees import difference
from tests.support.tree_nets import DYNAMIC, DictNet, PairNet, TextNet, batches_of, pairs, seeded, texts

NAMED = dict(zip(("left", "right"), pairs(16), strict=True))


@pytest.mark.parametrize(
    ("kind", "example"), [(PairNet, pairs(16)), (PairNet, NAMED), (TextNet, texts(16)), (DictNet, texts(16))]
)
def test_a_tree_becomes_integers(kind: type[nn.Module], example: Tree) -> None:
    net, backend = seeded(kind), FXBackend(dynamic={} if kind is PairNet else DYNAMIC)
    backend.check(net, (), example)
    with torch.no_grad():
        prepared = backend.prepare(net, example).eval()
        prepared.fake_quantize(False)
        ranges = Ranges(prepared)
        ranges.drop()
        trees.call(prepared, example)
        ranges.update(ranges.observed(), averaging=1.0)
        prepared.fake_quantize(True)
        program = open_program(backend.serialize(backend.convert(prepared), example))
        batches = batches_of(net)
        if isinstance(example, dict) and kind is PairNet:
            batches = [dict(zip(example, each, strict=True)) for each in batches]
        for each in batches:
            assert difference(program(each), trees.call(prepared, each)) < 0.1, kind
    assert "head.weight" in prepared.integer_weights()


def test_what_fx_cannot_take_names_pt2e() -> None:
    class Nested(nn.Module):
        def forward(self, both: tuple[Tensor, Tensor]) -> Tensor:
            return both[0] + both[1]

    class Branching(PairNet):
        def forward(self, left: Tensor, right: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(left if left.sum() > 0 else -left, right)

    for net, example in ((Nested(), {"both": (torch.zeros(2, 3),) * 2}), (seeded(Branching), pairs(2))):
        with pytest.raises(QuantizationError) as error:
            FXBackend().prepare(net.eval(), example)
        assert "pt2e" in str(error.value.hint)
