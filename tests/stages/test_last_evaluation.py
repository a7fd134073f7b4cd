"""The evaluation details kept belong to the model that a stage returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dist_train.distributed.world import World
from dist_train.stages.train import LastEvaluation
from dist_train.training.evaluate import Evaluation
from dist_train.training.loop import fit
from tests.support.training_loops import CLASSES, make, mlp


def trained(select: str) -> tuple[LastEvaluation, list[Evaluation], Any]:
    """Trains four epochs, the second of which is the best."""
    seen: list[Evaluation] = []
    plain = make(World(), mlp()).run.evaluate

    def evaluate(model: nn.Module) -> Evaluation:
        found = plain(model)
        score = 0.9 if len(seen) in (1, 4) else 0.5 + len(seen) / 100
        seen.append(Evaluation({**found.metrics, "top1": score}, found.decisions, found.details))
        return seen[-1]

    last = LastEvaluation(evaluate)
    made = make(World(), mlp(), epochs=4, config={"select": select}, evaluate_with=last)
    return last, seen, fit(made.run, mlp(), None)


def counted(evaluation: Evaluation) -> Any:
    assert evaluation.details is not None
    return evaluation.details.gather(World(), (0.5,), (0.25,))


def test_the_last_epoch_s_details_cost_no_second_evaluation() -> None:
    last, seen, state = trained("last")
    assert last.of(state) is seen[3]
    assert len(seen) == 4


def test_where_an_earlier_epoch_is_chosen_the_details_are_its_own() -> None:
    last, seen, state = trained("best")
    assert state.chosen_step < state.step == 16
    found = last.of(state)
    assert len(seen) == 5
    assert found.metrics == state.metrics == seen[1].metrics
    assert counted(found) == counted(seen[1]) != counted(seen[3])


def test_details_add_up_to_the_metrics() -> None:
    evaluation = make(World(), mlp()).run.evaluate(mlp().eval())
    confusion = torch.tensor(counted(evaluation)["metrics"]["confusion"])
    assert confusion.shape == (CLASSES, CLASSES) and int(confusion.sum()) == evaluation.metrics["count"]
    assert float(confusion.diagonal().sum() / confusion.sum()) == pytest.approx(evaluation.metrics["top1"])
