"""The loop under rounds of which some do not count: it does their steps again, and learns and logs each once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from dist_train.data.loader import StepBatch
from dist_train.distributed.world import World
from dist_train.training.loop import fit
from dist_train.training.rounds import Together
from dist_train.training.state import TrainState
from tests.support.training_loops import flat, make, mlp


class Repeating(Together):
    """Has every third trial of a step fail."""

    trials = 0

    def begin(self, state: TrainState) -> None:
        self.state = state

    def batches(self, epoch: int, first: int) -> Iterator[StepBatch]:
        for batch in super().batches(epoch, first):
            self.again = True
            while self.again:
                yield batch

    def counts(self) -> bool:
        self.trials += 1
        self.again = self.trials % 3 == 0
        if self.again:
            for parameter in self.state.parameters:
                parameter.grad = None
        return not self.again


def test_a_step_that_does_not_count_is_done_again_and_changes_nothing() -> None:
    plain, repeated = make(World(), mlp()), make(World(), mlp())
    fit(plain.run, None)
    rounds = Repeating(repeated.run.loader, repeated.run.steps_per_epoch)
    state = fit(replace(repeated.run, rounds=rounds), None)
    assert state.step == repeated.run.total_steps < rounds.trials
    assert flat(repeated.run.learner.model) == flat(plain.run.learner.model)
    assert repeated.recorder.of("loss") == plain.recorder.of("loss")
