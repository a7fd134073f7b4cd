"""Float training, and the set-up of the loop that float and quantization-aware training share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from dist_train.config.advice import idle_settings
from dist_train.config.fit import FitConfig
from dist_train.config.stages import TrainConfig
from dist_train.data.arrays import ImageArrays
from dist_train.data.loader import EstimationLoader, TrainLoader
from dist_train.errors import DataError, ModelError
from dist_train.models.batch_norm import synchronised_batch_norms
from dist_train.run_dir.ledger import Ledger
from dist_train.stages.base import Stage
from dist_train.stages.compilation import compilation
from dist_train.stages.context import Context
from dist_train.training.evaluate import Evaluation
from dist_train.training.hooks import Hook
from dist_train.training.learner import Learner
from dist_train.training.loop import Fit, fit
from dist_train.training.parts import Parts, resolve_parts
from dist_train.training.profiler import NoProfile, Profile
from dist_train.training.recalibration import estimate_moments
from dist_train.training.reduction import StepReduction
from dist_train.training.rounds import Rounds, Together
from dist_train.training.state import TrainState
from dist_train.training.unused import find_unused

TRAINING = "training"
"""Key of a stage's product, with the loop's state after its last step. Only a run that goes on from there needs it."""


class Train(Stage):
    """Trains the float model."""

    settings: TrainConfig

    def run(self, context: Context) -> dict[str, Any]:
        learner = FloatLearner(context, self.settings, resolve_parts(context.config, self.name, context.model))
        with _batch_norms(context):
            state = run_loop(context, self.name, self.settings, learner)
        context.results["models"]["fp32"] = dict(state.metrics)
        context.keep_details("fp32", learner.evaluation_of(state))
        product: dict[str, Any] = {"model": context.after_training(state.chosen).state_dict()}
        if state.ended is not None:
            product[TRAINING] = state.ended
        return product

    def restore(self, context: Context, product: dict[str, Any]) -> None:
        context.model.load_state_dict(product["model"])
        context.model.eval()


def _batch_norms(context: Context) -> AbstractContextManager[None]:
    """Synchronises BatchNorm while training, if `sync_batchnorm` is set and there are several ranks."""
    if context.config.sync_batchnorm and context.world.world_size > 1:
        return synchronised_batch_norms(context.model, context.world)
    return nullcontext()


class StageLearner(Learner):
    """A stage's learner that keeps its newest evaluation, whose details are reported."""

    _last: Evaluation | None = None

    @abstractmethod
    def measure(self, model: nn.Module) -> Evaluation:
        """Evaluates a model, without storing the evaluation. Collective."""

    def evaluate(self, model: nn.Module) -> Evaluation:
        self._last = self.measure(model)
        return self._last

    def evaluation_of(self, state: TrainState) -> Evaluation:
        """Returns the chosen model's evaluation; evaluates again if the loop chose an earlier model. Collective."""
        if self._last is None or self._last.metrics != state.metrics:
            return self.evaluate(state.chosen)
        return self._last


class FloatLearner(StageLearner):
    """Trains the float model."""

    def __init__(self, context: Context, settings: FitConfig, parts: Parts | None = None) -> None:
        reduction = StepReduction(context.world, context.model)
        recomputed = parts.recomputed if parts is not None else ()
        super().__init__(context.model, reduction, parts, None, settings.unfreeze_at, recomputed)
        self._context, self._settings = context, settings

    def hooks(self, total_steps: int) -> Sequence[Hook]:
        return ()

    def measure(self, model: nn.Module) -> Evaluation:
        return self._context.evaluate(model)

    def recalibrate(self, averaged: nn.Module) -> None:
        context = self._context
        with context.strategy.unsharded(averaged):
            estimate_moments(averaged, ema_sample(context, self._settings), context.world, context.strategy.autocast)


def ema_sample(context: Context, settings: FitConfig) -> EstimationLoader:
    """Returns the training samples from which a moving average's statistics are estimated."""
    return context.data.training_sample(settings.ema_samples, context.config.data.eval_batch_size)


def run_loop(context: Context, stage: str, settings: FitConfig, learner: Learner) -> TrainState:
    """Runs the training loop for a stage.

    Raises:
        DataError: an epoch has no complete step.
    """
    config, progress = context.config, context.progress
    settings = _for_this_batch(context, stage, settings)
    loader = context.data.train_loader(stage)
    steps, epochs = loader.steps_per_epoch, settings.epochs
    if steps == 0:
        raise DataError(
            f"{context.data.train_samples} training samples make no complete global batch of "
            f"{config.data.global_batch_size}, and data.drop_last is true",
            "--data.drop_last false, or a smaller --data.global_batch_size",
        )
    if config.debug.fast_dev_run:
        steps, epochs = min(steps, 2), 1
    else:
        for problem in idle_settings(stage, settings, epochs, steps):
            progress.warn(str(problem))
    progress.data_hint = _data_hint(context)
    freezing = learner.freezing
    begun = context.resume or (context.extension if stage == "train" else None) or {"step": 0}
    if len(freezing) and (freezing.for_good or begun["step"] // steps < (settings.unfreeze_at or 0)):
        until = "" if freezing.for_good else f" until epoch {settings.unfreeze_at}"
        progress.say(f"{stage}: freezes {freezing}{until}")
    try:
        if freezing.for_good:
            freezing.enter(0)
        _look_for_unused_parameters(context, stage, learner.model)
        run = _set_up(context, stage, settings, learner, loader, epochs, steps)
        state = fit(run, context.resume, context.extension if stage == "train" else None)
    finally:
        freezing.release()
    context.results["stages"].setdefault(stage, {}).update(_outcome(run, state))
    return state


def _set_up(
    context: Context, stage: str, settings: FitConfig, learner: Learner, loader: TrainLoader, epochs: int, steps: int
) -> Fit:
    return Fit(
        stage=stage,
        config=context.config,
        settings=settings,
        epochs=epochs,
        steps_per_epoch=steps,
        loader=loader,
        rounds=_rounds(context, stage, loader, steps),
        example=context.example(),
        task=context.task,
        strategy=context.strategy,
        compilation=compilation(context, stage, settings, learner.model, loader, epochs * steps),
        learner=learner,
        checkpoints=context.checkpoints,
        ledger=context.ledger,
        trackers=context.trackers,
        progress=context.progress,
        profile=_profile(context, stage),
        keeps_end=stage == "train" and context.config.checkpoint.keep.training,
    )


def _rounds(context: Context, stage: str, loader: TrainLoader, steps: int) -> Rounds:
    if context.config.strategy != "ft":
        return Together(loader, steps)
    # Needs torchft, which only a run with that strategy has.
    from dist_train.strategies.ft import FT
    from dist_train.training.replica_rounds import ReplicaRounds

    strategy, ledger = context.strategy, context.ledger
    assert isinstance(strategy, FT) and not isinstance(ledger, Ledger)
    data = context.data.splits.fingerprint
    return ReplicaRounds(stage, context.config, loader, steps, strategy, ledger, data, context.progress.say)


def _look_for_unused_parameters(context: Context, stage: str, model: nn.Module) -> None:
    """Warns of parameters without a gradient, and prepares the strategy for them. Collective.

    Raises:
        ModelError: no parameter can be trained; or steps leave some out, and the config forbids to look for them.
    """
    unused = find_unused(model, context.example(), context.world, context.strategy.autocast)
    asked = context.config.find_unused_parameters
    if unused and asked is False and context.world.world_size > 1:
        raise unused.refusal(stage)
    for line in unused.lines(stage):
        context.progress.warn(line)
    if unused.at_times and context.config.strategy == "fsdp" and context.world.world_size > 1:
        raise ModelError(
            f"{stage}: strategy fsdp cannot train layers that some steps leave out: their gradients would be 0, and "
            "momentum and weight decay would change them",
            "--strategy ddp; or take what drops them at random out of the model (stochastic depth, layer drop)",
        )
    if unused and asked == "auto" and context.world.world_size > 1:
        context.progress.say(f"auto: {stage} looks for unused parameters in every step, as set-up found some")
    context.strategy.find_unused_parameters = bool(unused) if asked == "auto" else asked


def _for_this_batch(context: Context, stage: str, settings: FitConfig) -> FitConfig:
    """Returns the settings with the learning rate scaled to the global batch size; prints a line if it is scaled."""
    batch, optim = context.config.data.global_batch_size, settings.optim
    if optim.base_batch_size is None:
        return settings
    scaled = optim.scaled(batch)
    context.progress.say(f"{stage}: lr {scaled.lr:.6g} = {optim.lr:g} x {batch} / {optim.base_batch_size}")
    for number, (before, after) in enumerate(zip(optim.groups, scaled.groups, strict=True)):
        if before.lr is not None:
            context.progress.say(f"{stage}: lr of groups.{number} {after.lr:.6g}, scaled alike")
    return settings.model_copy(update={"optim": scaled})


def _profile(context: Context, stage: str) -> Profile | NoProfile:
    wanted = context.config.profile
    if wanted is None or not context.world.is_main:
        return NoProfile()
    first, last = wanted.steps
    return Profile(stage, first, last, context.run_dir.profile_of(stage), context.progress.say)


def _data_hint(context: Context) -> str:
    """Returns a hint for a loop that waits for its data."""
    if context.config.strategy == "ft":
        return "the wait for the other replicas counts, too: look at theirs; else more --data.workers"
    if isinstance(context.data.splits.train, ImageArrays):
        return "image arrays are augmented between the steps: use fewer augmentations, or more --run.threads_per_rank"
    share = context.world.share_of_cores()
    workers = context.data.workers
    if workers < share:
        return f"--data.workers {share}, this rank's share of the cores; it is {workers}"
    return f"--data.workers is {workers}, this rank's share of the cores: use more cores, or cheaper samples"


def _outcome(run: Fit, state: TrainState) -> dict[str, Any]:
    """Returns the stage's entry in results.json: steps and epochs done, and the chosen step with `select: best`."""
    outcome: dict[str, Any] = {"steps": state.step, "epochs": state.step // run.steps_per_epoch}
    if state.skipped:
        outcome["skipped_steps"] = state.skipped
    if run.settings.early_stopping is not None:
        outcome["stopped_early"] = state.selection.stop and state.step < run.total_steps
    if run.settings.select == "best":
        outcome["selected"] = {
            "step": state.chosen_step,
            "epoch": state.chosen_step // run.steps_per_epoch,
            "by": state.selection.metric,
            "value": state.metrics[state.selection.metric],
        }
    return outcome
