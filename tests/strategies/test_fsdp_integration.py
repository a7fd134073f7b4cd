"""Tests that strategy fsdp trains as ddp does, in shards, on real gloo ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dist_train.config.tree import Config
from dist_train.distributed.world import World
from dist_train.errors import ConfigError, SetupError
from dist_train.strategies.ddp import DDP
from dist_train.strategies.fsdp import FSDP
from dist_train.strategies.shards import has_shards, local
from dist_train.training.freezing import Freezing
from dist_train.training.loop import fit
from dist_train.training.parts import Parts, resolve_parts
from tests.support.ranks import call
from tests.support.training_loops import CLASSES, make, mlp, normed

CLOSE = 1e-5


class Layers(nn.Module):
    """A transformer of two layers on the rows of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        layers = [nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(2)]
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x.flatten(1, 2))
        for layer in self.layers:
            x = layer(x)
        out: torch.Tensor = self.head(x.mean(1))
        return out


def transformer() -> nn.Module:
    torch.manual_seed(1)
    return Layers()


MODELS = {"mlp": (mlp, ()), "normed": (normed, ("0",)), "transformer": (transformer, ("layers.0", "layers.1"))}


def trained(world: World, kind: str, sharded: bool, settings: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Trains a model by one of the strategies."""
    build, blocks = MODELS[kind]
    model = build()
    made = make(world, model, strategy_class=FSDP if sharded else DDP, config=settings, size=37, batch=10, **options)
    made.run.learner.parts = Parts(blocks=blocks)
    state = fit(made.run, None)
    whole = made.run.strategy.whole(state.chosen)
    assert whole is not None and (whole is state.chosen) != sharded
    return {
        "losses": made.recorder.of("loss"),
        "norms": made.recorder.of("grad_norm"),
        "evaluations": made.recorder.of("eval_loss"),
        "state": torch.cat([each.detach().double().flatten() for each in whole.state_dict().values()]).tolist(),
    }


def both(world: World, kind: str, settings: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Returns the largest difference of each value between ddp and fsdp, and the number of values."""
    ours, theirs = (trained(world, kind, sharded, settings, **options) for sharded in (True, False))
    found = {}
    for name, values in theirs.items():
        assert len(values) == len(ours[name]) > 0, name
        expected = torch.tensor(values, dtype=torch.float64)
        found[name] = float(
            ((torch.tensor(ours[name], dtype=torch.float64) - expected).abs() / (1 + expected.abs())).max()
        )
    return found


BOTH = "tests.strategies.test_fsdp_integration:both"
EMA = {"ema_decay": 0.9, "clip_grad_norm": 0.5}


@pytest.mark.heavy
def test_accumulating_clipped_and_averaged_fsdp_trains_as_ddp() -> None:
    """37 samples: in the last step of an epoch the ranks have unequal numbers of micro-batches."""
    settings = {**EMA, "optim": {"name": "adamw", "lr": 0.01}}
    for found in call(2, BOTH, "transformer", settings, {"micro": 3}):
        assert max(value for name, value in found.items() if name != "state") < CLOSE, found
        # AdamW makes a step of a gradient that is nothing but rounding, as of a key's bias.
        assert found["state"] < 1e-2, found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    ("kind", "settings", "options"),
    [
        ("mlp", {}, {"precision": "fp16"}),
        ("normed", EMA, {"micro": 3}),
        # Not with BatchNorm: the gradient of a bias before it is nothing but rounding, and RMSprop makes a step of it.
        ("mlp", {"optim": {"name": "RMSprop", "lr": 0.01}}, {}),
        ("transformer", EMA, {}),
        ("transformer", {}, {"precision": "bf16"}),
    ],
)
def test_fsdp_trains_as_ddp(ranks: int, kind: str, settings: dict[str, Any], options: dict[str, Any]) -> None:
    for found in call(ranks, BOTH, kind, settings, options):
        assert max(found.values()) < CLOSE, found


def frozen_at_first(world: World) -> float:
    """Trains with the first layer frozen in the first epoch; returns the difference between ddp and fsdp."""
    states = []
    for strategy in (FSDP, DDP):
        made = make(world, mlp(), strategy_class=strategy, epochs=3)
        learner = made.run.learner
        parts = Parts(frozen=frozenset({"1.weight", "1.bias"}))
        learner.freezing = Freezing(learner.model, learner.reduction, parts, {}, 1)
        before = learner.model.get_parameter("1.weight").detach().clone()
        whole = made.run.strategy.whole(fit(made.run, None).model)
        assert whole is not None and not torch.equal(whole.get_parameter("1.weight"), before)
        states.append(torch.cat([each.detach().flatten() for each in whole.parameters()]))
    return float((states[0] - states[1]).abs().max())


@pytest.mark.slow
def test_layers_that_begin_to_learn_learn_in_shards() -> None:
    assert max(call(2, "tests.strategies.test_fsdp_integration:frozen_at_first")) < CLOSE


def spread(world: World) -> dict[str, Any]:
    """Returns what a rank holds of a transformer, and how a copy of it and its moving average are spread."""
    strategy, model = FSDP(world, "fp32"), transformer()
    whole = {name: each.detach().clone() for name, each in model.named_parameters()}
    strategy.shard(model, [["layers.0"], ["layers.1"]])
    own = sum(local(each).numel() for each in model.parameters())
    copied = strategy.copy(model)
    mine = [
        torch.equal(local(one), local(two)) for one, two in zip(copied.parameters(), model.parameters(), strict=True)
    ]
    again = strategy.whole(model)
    assert again is not None
    same = [torch.equal(whole[name], each) for name, each in again.named_parameters()]
    with strategy.unsharded(model):
        inside = not has_shards(model)
    return {
        "own": own,
        "all": sum(each.numel() for each in whole.values()),
        "same": all(same) and len(same) == len(whole),
        "copied": all(mine),
        "unsharded": inside and has_shards(model),
    }


@pytest.mark.slow
def test_each_rank_holds_its_shards_and_gives_the_whole_model_back() -> None:
    found = call(3, "tests.strategies.test_fsdp_integration:spread")
    assert sum(each["own"] for each in found) == found[0]["all"]
    assert all(each["same"] and each["copied"] and each["unsharded"] for each in found)


class ReadsABlock(Layers):
    """Reads a parameter of a block outside the block's forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.layers[0].linear1.weight.mean()


class Sparse(nn.Module):
    """Has an embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 8, sparse=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.embed(x.flatten(1).long())
        return found


def refused(world: World, sparse: bool) -> str:
    strategy, model = FSDP(world, "fp32"), Sparse() if sparse else ReadsABlock()
    strategy.shard(model, () if sparse else [["layers.0"], ["layers.1"]])
    try:
        strategy.warm_up_buckets(strategy.wrap(model), torch.zeros(2, 1, 4, 4))
    except SetupError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_a_parameter_that_is_read_outside_its_block_is_refused_with_what_to_type() -> None:
    for message in call(2, "tests.strategies.test_fsdp_integration:refused", False):
        assert "outside of its forward" in message and "--fsdp.wrap '[]'" in message


@pytest.mark.slow
def test_sparse_gradients_are_refused_in_words() -> None:
    for message in call(2, "tests.strategies.test_fsdp_integration:refused", True):
        assert "sparse gradients" in message and "sparse=False" in message


def blocks(model: nn.Module, wrap: Any = "auto") -> tuple[str, ...]:
    return resolve_parts(Config.model_validate({"strategy": "fsdp", "fsdp": {"wrap": wrap}}), "train", model).blocks


def test_blocks_are_the_outermost_modules_that_repeat_by_class() -> None:
    assert blocks(transformer()) == ("layers.0", "layers.1")
    assert blocks(mlp()) == ()
    assert blocks(transformer(), ["layers.1", "layers.1.self_attn"]) == ("layers.1.self_attn", "layers.1")
    assert blocks(transformer(), [{"type": "TransformerEncoderLayer"}]) == ("layers.1", "layers.0")


def test_blocks_by_size_are_all_modules_beyond_it_the_inner_ones_first() -> None:
    large = sum(each.numel() for each in Layers().layers[0].parameters())
    inner = [f"layers.{number}.{name}" for number in (1, 0) for name in ("linear2", "linear1", "self_attn")]
    assert blocks(Layers(), {"min_params": 100}) == (*inner[:3], "layers.1", *inner[3:], "layers.0")
    assert blocks(Layers(), {"min_params": large - 1}) == ("layers.1", "layers.0"), "a ModuleList is not called"
    assert blocks(Layers(), {"min_params": large}) == ()


def whole_after_forward(world: World) -> list[bool]:
    """Tells for both values of reshard_after_forward if a block is whole after its forward, and after backward."""
    found = []
    for reshards in (True, False):
        model, strategy = transformer(), FSDP(world, "fp32")
        strategy.reshard_after_forward = reshards
        strategy.shard(model, [["layers.1"], ["layers.0"]])
        for each in (model, strategy.copy(model)):
            with strategy.unsharded(each):
                pass
            loss = strategy.wrap(each)(torch.zeros(2, 1, 4, 4)).sum()
            found.append(not has_shards(each.get_submodule("layers.0")))
            loss.backward()
            found.append(not has_shards(each.get_submodule("layers.0")))
    return found


def test_blocks_stay_whole_from_forward_to_backward_if_asked() -> None:
    for found in call(2, "tests.strategies.test_fsdp_integration:whole_after_forward"):
        assert found == [False, False, False, False, True, False, True, False]


def test_a_pattern_of_blocks_passes_modules_without_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    assert blocks(model, ["*"]) == ("2", "0")
    with pytest.raises(ConfigError, match="1 cannot be a block: it has no parameters"):
        blocks(model, ["1"])


def test_modules_that_share_parameters_are_no_blocks_but_what_repeats_in_them_is() -> None:
    model = Layers()
    model.layers[1].linear1.weight = model.layers[0].linear1.weight
    assert blocks(model) == ("layers.0.self_attn", "layers.1.self_attn")
    with pytest.raises(ConfigError) as raised:
        blocks(model, ["layers.0", "layers", "leyers.1"])
    told = "\n".join(map(str, raised.value.problems))
    assert "it shares a parameter with layers.1.linear1.weight" in told
    assert "a ModuleList is not called" in told
    assert "'leyers.1' matches no module" in told


def test_parameters_that_cannot_be_cut_are_refused_by_name() -> None:
    model = Layers()
    model.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))
    model.register_parameter("none", nn.Parameter(torch.zeros(0, 2)))
    model.head.double()
    with pytest.raises(ConfigError) as raised:
        blocks(model)
    told = "\n".join(map(str, raised.value.problems))
    assert "fsdp cannot shard scale, which has no dimension" in told
    assert "fsdp cannot shard none, which has no elements" in told
    assert "the model has torch.float32 and torch.float64" in told
