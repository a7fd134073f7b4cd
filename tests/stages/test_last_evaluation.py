"""The stored details belong to the model that the stage hands on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from dist_train.distributed.world import World
from dist_train.stages.train import StageLearner
from dist_train.training.evaluate import Evaluation
from dist_train.training.hooks import Hook
from dist_train.training.learner import Learner
from dist_train.training.loop import fit
from dist_train.training.state import TrainState
from tests.support.training_loops import CLASSES, make, mlp


class Scored(StageLearner):
    """Evaluates like the learner of `make`, but with given scores, of which the second and fifth are the best."""

    def __init__(self, plain: Learner) -> None:
        super().__init__(plain.model, plain.reduction)
        self._plain = plain
        self.seen: list[Evaluation] = []

    def hooks(self, total_steps: int) -> Sequence[Hook]:
        return ()

    def measure(self, model: nn.Module) -> Evaluation:
        found = self._plain.evaluate(model)
        score = 0.9 if len(self.seen) in (1, 4) else 0.5 + len(self.seen) / 100
        self.seen.append(Evaluation({**found.metrics, "top1": score}, found.decisions, found.details))
        return self.seen[-1]

    def recalibrate(self, averaged: nn.Module) -> None:
        return


def trained(select: str) -> tuple[Scored, TrainState]:
    """Trains four epochs; the second is the best."""
    run = make(World(), mlp(), epochs=4, config={"select": select}).run
    run.learner = learner = Scored(run.learner)
    return learner, fit(run, None)


def counted(evaluation: Evaluation) -> Any:
    assert evaluation.details is not None
    return evaluation.details.gather(World(), (0.5,), (0.25,))


def test_the_last_epoch_s_details_cost_no_second_evaluation() -> None:
    learner, state = trained("last")
    assert learner.evaluation_of(state) is learner.seen[3]
    assert len(learner.seen) == 4


def test_where_an_earlier_epoch_is_chosen_the_details_are_its_own() -> None:
    learner, state = trained("best")
    assert state.chosen_step < state.step == 16
    found = learner.evaluation_of(state)
    assert len(learner.seen) == 5
    assert found.metrics == state.metrics == learner.seen[1].metrics
    assert counted(found) == counted(learner.seen[1]) != counted(learner.seen[3])


def test_details_add_up_to_the_metrics() -> None:
    evaluation = make(World(), mlp()).run.learner.evaluate(mlp().eval())
    confusion = torch.tensor(counted(evaluation)["metrics"]["confusion"])
    assert confusion.shape == (CLASSES, CLASSES) and int(confusion.sum()) == evaluation.metrics["count"]
    assert float(confusion.diagonal().sum() / confusion.sum()) == pytest.approx(evaluation.metrics["top1"])
