"""Trains a model: `fit` is the one loop of float and quantization-aware training.

The order within a step is fixed: seed, forward and backward, reduction, clip, optimizer, schedule, average, ledger.
A step of replicas that does not count ends after the reduction. An epoch ends with the evaluation, then the checkpoint.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from dist_train.config.fit import FitConfig
from dist_train.config.tree import Config
from dist_train.console.progress import Progress, epoch_line, plain_line
from dist_train.data.loader import TrainLoader, seed_everything
from dist_train.data.permutation import derive_key
from dist_train.errors import Preempted
from dist_train.run_dir.ledger import Ledger, NoLedger
from dist_train.run_dir.replica_ledger import ReplicaLedger
from dist_train.strategies.base import StepOutcome, Strategy
from dist_train.tasks import Task
from dist_train.trackers.base import Trackers
from dist_train.training.compilation import Compilation
from dist_train.training.learner import Learner
from dist_train.training.profiler import NoProfile, Profile
from dist_train.training.rounds import Rounds
from dist_train.training.same_state import require_same_everywhere, require_sound
from dist_train.training.selection import Selection
from dist_train.training.state import TrainState
from dist_train.training.step import train_step
from dist_train.training.step_log import StepLog
from dist_train.trees import Tree


class Checkpoints(Protocol):
    """Saves and loads the loop's state. Every rank calls it."""

    def save_step(
        self, stage: str, step: int, state: dict[str, Any], best_first: Sequence[int], needed: int | None
    ) -> None:
        """Saves the state of `step` as it is now, and removes older ones; may go on with that after it returns.

        Keeps the state of step `needed`, and as many of the evaluated steps `best_first` as configured.
        """

    def settle(self) -> None:
        """Waits until the state is saved. Collective.

        Raises:
            CheckpointError: it cannot be saved; PeerError on the other ranks.
        """

    def load_step(self, stage: str, step: int) -> dict[str, Any]:
        """Loads the state that was saved at `step`. Collective."""


@dataclass(kw_only=True)
class Fit:
    """One stage's run of the loop.

    Attributes:
        settings: settings of the stage, with the learning rate for this global batch size.
        epochs, steps_per_epoch: length of the training; a fast dev run has fewer than the settings say.
        example: inputs as the model takes them, two rows, on the device.
        rounds: brings the batches of an epoch, and tells which steps count.
        keeps_end: set `TrainState.ended` after the last step.
    """

    stage: str
    config: Config
    settings: FitConfig
    epochs: int
    steps_per_epoch: int
    loader: TrainLoader
    rounds: Rounds
    example: Tree
    task: Task
    strategy: Strategy
    compilation: Compilation
    learner: Learner
    checkpoints: Checkpoints
    ledger: Ledger | ReplicaLedger | NoLedger
    trackers: Trackers
    progress: Progress
    profile: Profile | NoProfile
    keeps_end: bool = False

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch


def fit(run: Fit, resume: dict[str, Any] | None, extended: dict[str, Any] | None = None) -> TrainState:
    """Trains the learner's model in place to the last step, from the state `resume` or from the beginning.

    extended: state of another run's training to begin with, see `TrainState.extend`; not where this run resumes.

    Returns:
        the state: its `chosen` model, in eval mode, is the stage's result, with the metrics in `metrics`.

    Raises:
        NonFiniteLossError: on all ranks; saved checkpoints are finite.
        Preempted: on all ranks, after the state is saved, if any rank was asked to stop.
    """
    run.strategy.new_scaler()
    selection = Selection(run.settings, run.task.headline, run.task.lower_is_better)
    scaler = run.strategy.scaler
    learner = run.learner
    if spread := run.strategy.shard(learner.model, learner.blocks):
        run.progress.say(f"{run.stage}: {spread}")
    state = TrainState(
        learner.model,
        run.settings,
        run.total_steps,
        run.steps_per_epoch,
        selection,
        scaler,
        groups=learner.parts.groups,
        names=learner.names,
        freezing=learner.freezing,
        copied=run.strategy.copy,
    )
    if resume is not None:
        state.load_state_dict(resume)
    elif extended is not None:
        state.extend(extended)
    if (state.step < run.total_steps and not selection.stop) or state.epoch_open:
        run.progress.begin(run.stage, run.total_steps, state.step, run.task.score_name)
        run.profile.begin(state.step, run.total_steps)
        try:
            run.rounds.begin(state)
            _train(run, state)
            run.rounds.end()
        finally:
            run.rounds.leave()
            run.profile.end()
            run.learner.recompute(False)
        run.progress.end()
    state.chosen_step = state.step
    best = selection.best_step
    replaced = run.settings.select == "best" and best is not None and best != state.step
    if run.keeps_end:
        state.end(replaced=replaced)
    if replaced:
        assert best is not None
        state.take_model(run.checkpoints.load_step(run.stage, best))
    state.chosen.eval()
    return state


def _train(run: Fit, state: TrainState) -> None:
    model, config, hooks = state.model.train(), run.config, run.learner.hooks(run.total_steps)
    freezing = run.learner.freezing
    freezing.enter((state.step - state.epoch_open) // run.steps_per_epoch)
    run.learner.recompute(True)
    run.learner.reduction.counts_losses = run.task.sums_losses
    wrapped = _wrap(run, model)
    world = run.strategy.world
    lag = 1 if world.device.type == "cuda" else 0
    log = StepLog(run.stage, run.total_steps, config.log.every_steps, run.progress, run.trackers, lag)
    first_step, first_epoch = True, state.step // run.steps_per_epoch
    if state.epoch_open:  # the run stopped between an epoch's last step and its evaluation
        for hook in hooks:
            hook.before_step(state.step - 1)
        _end_epoch(run, state, (state.step - 1) // run.steps_per_epoch)
    while state.step < run.total_steps and not state.selection.stop:
        epoch, first = divmod(state.step, run.steps_per_epoch)
        if freezing.enter(epoch):
            run.progress.say(f"{run.stage}: epoch {epoch + 1}/{run.epochs}: unfreezes {freezing}")
            del wrapped  # the strategy wraps the parameters that learn
            wrapped, first_step, first_epoch = _wrap(run, model), True, epoch
        # The first epoch compiles the model for every batch shape, which may take longer than the watchdog's timeout.
        world.heartbeat.patience = world.timeout if run.compilation.active and epoch == first_epoch else 0.0
        world.heartbeat.begin("data")
        for batch in log.clock.timed(run.rounds.batches(epoch, first)):
            step = state.step
            world.heartbeat.at_step(run.stage, step)
            for hook in hooks:
                hook.before_step(step)
            if first_step:
                with world.heartbeat.within("set-up", at_least=world.timeout):  # compiles, and connects the ranks
                    run.strategy.warm_up_buckets(wrapped, batch.micro_batches[0].inputs)
            run.profile.before_step(step)
            seed_everything(derive_key("step", config.run.seed, run.stage, step, run.strategy.rank))
            train_step(wrapped, batch, run.task, run.strategy, run.learner.reduction)
            pending = run.learner.reduction.finish(step)
            if not run.rounds.counts():
                continue  # the batches begin with this step again
            world.heartbeat.enter("update")
            log.add(pending, step, epoch, state.optimizer.param_groups[0]["lr"], batch.global_count)
            if run.loader.may_leave_out or run.task.sums_losses:
                pending.rescale(state.model)
            outcome = _update(run, state, with_norm=log.logs(step))
            log.updated(outcome.grad_norm)
            run.ledger.record(run.stage, epoch, step, batch.ids, skipped=outcome.skipped, left_out=batch.left_out)
            if first_step:
                state.require_states_alike()
                require_same_everywhere(run.strategy, state, run.stage, run.example)
                first_step = False
            every = config.checkpoint.every_steps
            due = every is not None and state.step % every == 0
            if (due or log.stop_agreed) and state.step % run.steps_per_epoch:
                state.left_out += log.drain()
                require_sound(run.strategy, state, run.stage, run.example)
                _save(run, state)
                _stop_if(log.stop_agreed, run, state)
            world.heartbeat.begin("data")
        if run.rounds.stopped():  # between two steps
            state.left_out += log.drain()
            if state.step % run.steps_per_epoch:  # else the epoch's end has saved it
                _save(run, state)
            _stop_if(True, run, state)
        if run.rounds.moved():
            continue  # with the step that the others have reached
        world.heartbeat.patience = 0.0
        state.left_out += log.drain()
        require_sound(run.strategy, state, run.stage, run.example)
        state.epoch_open = True
        if log.stop_agreed:  # the evaluation may take longer than stop.grace
            _save(run, state)
            _stop_if(True, run, state)
        _end_epoch(run, state, epoch)


def _wrap(run: Fit, model: nn.Module) -> nn.Module:
    run.strategy.carried = run.learner.reduction.size
    gc.collect()  # ends what an earlier wrapper has hooked into the parameters
    return run.compilation.wrap(model, run.strategy)


def _stop_if(agreed: bool, run: Fit, state: TrainState) -> None:
    """Ends the run if the ranks agreed to stop, once the state that was given to `_save` is on the disk.

    Raises:
        Preempted: on all ranks, if `agreed`.
        CheckpointError: what rank 0 saves beside the loop has failed, which is why it agreed; PeerError on the others.
    """
    if agreed:
        run.checkpoints.settle()
        raise Preempted(f"stopped in {run.stage} after step {state.step} of {run.total_steps}, which is saved")


def _update(run: Fit, state: TrainState, with_norm: bool) -> StepOutcome:
    """Clips the gradients, steps optimizer and schedule, and updates the moving average."""
    # Clipping at infinity computes the norm and multiplies the gradients by exactly 1.
    unclipped = math.inf if with_norm else None
    outcome = run.strategy.step(state.optimizer, state.model, run.settings.clip_grad_norm or unclipped)
    for parameter in state.parameters:  # as zero_grad, without its profiling
        parameter.grad = None
    if outcome.skipped:
        # As in torch's AMP recipe, a skipped step advances neither schedule nor average.
        state.skipped += 1
    else:
        state.schedule.step()
        if state.average is not None:
            state.average.update_parameters(state.model)
    state.step += 1
    return outcome


def _report_left_out(run: Fit, state: TrainState, epoch: int) -> None:
    if run.loader.may_leave_out:
        run.trackers.log(run.stage, epoch, state.step - 1, {"skipped_samples": state.left_out})
    if state.left_out:
        run.progress.say(
            f"{run.stage}: epoch {epoch + 1}/{run.epochs}: left out {state.left_out} samples that cannot be decoded"
        )
    state.left_out = 0


def _end_epoch(run: Fit, state: TrainState, epoch: int) -> None:
    _report_left_out(run, state, epoch)
    last, stop, evaluated = state.step == run.total_steps, False, None
    run.learner.recompute(False)
    if last or (epoch + 1) % run.settings.evaluate_every == 0:
        if state.average is not None:
            # Its buffers are copies from the last step's model and do not fit the average.
            run.learner.recalibrate(state.average.module)
        state.chosen.eval()
        evaluation = run.learner.evaluate(state.chosen)
        # Some state follows the rows of evaluations.
        require_same_everywhere(run.strategy, state, run.stage, run.example)
        state.metrics, stop = evaluation.metrics, evaluation.stop
        state.model.train()
        run.trackers.log(
            run.stage, epoch, state.step - 1, {f"eval_{name}": value for name, value in state.metrics.items()}
        )
        state.selection.add(state.step, state.metrics)
        evaluated = state.metrics
        place = (run.stage, epoch + 1, run.epochs, state.metrics)
        form = run.config.log.epoch_format
        run.progress.say(plain_line(*place) if form is None else epoch_line(form, *place))
    run.learner.recompute(True)
    state.schedule.end_epoch(evaluated)
    if state.selection.stop and not last:
        run.progress.say(_stopped(run, state, epoch + 1))
    state.epoch_open = False
    if not last:
        # The pipeline saves the end of a stage. An early stop is saved here, too, so that resuming does not train on.
        _save(run, state)
        _stop_if(stop, run, state)


def _stopped(run: Fit, state: TrainState, epoch: int) -> str:
    selection, best = state.selection, state.selection.best_step
    known = "" if best is None else f" on {selection.value_at(best):.6g} of epoch {best // run.steps_per_epoch}"
    return (
        f"{run.stage}: stopped early after epoch {epoch}/{run.epochs}: {selection.metric} has not improved"
        f"{known} for {selection.stale} evaluations"
    )


def _save(run: Fit, state: TrainState) -> None:
    selection = state.selection
    needed = selection.best_step if run.settings.select == "best" else None
    run.checkpoints.save_step(run.stage, state.step, state.state_dict(), selection.ranking, needed)
