"""Training on trees: equal on any number of ranks, also where a rank has no rows or a loss is counted otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dist_train.data.sampler import ElasticDistributedSampler
from dist_train.distributed.world import World
from dist_train.training.loop import fit
from dist_train.training.optim import build_optimizer
from dist_train.training.schedule import build_schedule
from tests.support.ranks import call
from tests.support.training_loops import Made, flat, make
from tests.support.tree_parts import Bag, Counted, Pair, Pairs, Tagger, Texts, TwoHeads, Words, padded

SIZE, BATCH, EPOCHS = 22, 6, 2
VARY = {"ids": {1: "words"}, "mask": {1: "words"}}
KINDS = ("dict", "tuple", "ragged", "damaged", "one row", "two heads", "summed", "summed micro")


def _model(kind: str) -> nn.Module:
    torch.manual_seed(1)
    if kind == "two heads":
        return TwoHeads()
    return Pair() if kind == "tuple" else Tagger() if kind.startswith("summed") else Bag()


def _made(world: World, kind: str, model: nn.Module, epochs: int = EPOCHS, every: int | None = None) -> Made:
    options: dict[str, Any] = {"size": SIZE, "batch": BATCH, "epochs": epochs, "checkpoint_every": every}
    if kind == "tuple":
        return make(world, model, **options, dataset=Pairs(SIZE))
    if kind == "ragged":
        return make(world, model, **options, dataset=Texts(SIZE, ragged=True), collate=padded, dynamic=VARY, micro=2)
    if kind == "damaged":
        return make(world, model, **options, dataset=Texts(SIZE, damaged=tuple(range(0, SIZE, 2))), micro=2)
    if kind == "one row":
        return make(world, model, size=7, batch=3, epochs=EPOCHS, dataset=Texts(7))
    if kind.startswith("summed"):
        micro = 1 if kind == "summed micro" else None
        return make(world, model, **options, dataset=Words(SIZE), task=Counted(2, {}), micro=micro)
    return make(world, model, **options, dataset=Texts(SIZE))


def _fit(world: World, kind: str) -> dict[str, Any]:
    model = _model(kind)
    made = _made(world, kind, model)
    state = fit(made.run, None)
    return {
        "parameters": flat(model),
        "losses": made.recorder.of("loss"),
        "metrics": state.metrics,
    }


def _all(world: World) -> dict[str, Any]:
    return {kind: _fit(world, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return _all(World())


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_losses_parameters_and_counts_are_those_of_one_rank(world_size: int, alone: dict[str, Any]) -> None:
    for results in call(world_size, "tests.training.test_trees_integration:_all"):
        for kind, expected in alone.items():
            found = results[kind]
            assert found["losses"] == pytest.approx(expected["losses"], abs=1e-6), kind
            assert found["parameters"] == pytest.approx(expected["parameters"], abs=2e-6), kind
            assert found["metrics"]["count"] == expected["metrics"]["count"], kind
            assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-5), kind


def test_an_evaluation_counts_each_sample_once(alone: dict[str, Any]) -> None:
    counts = {kind: alone[kind]["metrics"]["count"] for kind in KINDS}
    assert counts == {**dict.fromkeys(KINDS, SIZE), "damaged": SIZE // 2, "one row": 7}


def test_a_padded_text_trains_as_the_text_alone(alone: dict[str, Any]) -> None:
    assert alone["ragged"]["losses"] == pytest.approx(alone["dict"]["losses"], abs=1e-6)


def test_a_summed_loss_is_divided_by_the_count_of_the_global_batch(alone: dict[str, Any]) -> None:
    """Plain SGD on the mean over the words of each global batch."""
    model, data = _model("summed"), Words(SIZE)
    run = _made(World(), "summed", model).run
    optimizer = build_optimizer(model, run.settings.optim)
    rates = build_schedule(optimizer, run.settings.schedule, run.total_steps, run.steps_per_epoch)
    sampler = ElasticDistributedSampler(range(SIZE), 1, 0, seed=5, global_batch_size=BATCH)
    losses = []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for step in range(sampler.num_steps):
            items = [data[number] for number in sampler.global_batch(step).tolist()]
            ids, mask, parity = (
                torch.stack(each)
                for each in zip(
                    *((inputs["ids"], inputs["mask"], targets["parity"]) for inputs, targets in items), strict=True
                )
            )
            optimizer.zero_grad()
            loss = F.cross_entropy(model(ids, mask)["words"][mask], parity[mask])
            loss.backward()
            optimizer.step()
            rates.step()
            losses.append(float(loss.detach()))
    for kind in ("summed", "summed micro"):
        assert alone[kind]["losses"] == pytest.approx(losses, abs=1e-6)
        assert alone[kind]["parameters"] == pytest.approx(flat(model), abs=2e-6)


@pytest.mark.slow
def test_training_goes_on_from_a_saved_step_with_the_same_bits() -> None:
    for kind in ("ragged", "summed"):
        whole, resumed = _model(kind), _model(kind)
        first = _made(World(), kind, whole, epochs=1, every=2)
        fit(first.run, None)
        fit(_made(World(), kind, resumed, epochs=1).run, first.memory.states[2])
        assert flat(whole) == flat(resumed)
