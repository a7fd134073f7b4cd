"""Float training, and what it shares with quantization-aware training: a run of the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from dist_train.config.advice import idle_settings
from dist_train.config.stages import FitConfig, TrainConfig
from dist_train.data.arrays import ImageArrays
from dist_train.data.loader import EstimationLoader
from dist_train.distributed.world import World
from dist_train.errors import DataError
from dist_train.models.batch_norm import synchronised_batch_norms
from dist_train.stages.base import Stage
from dist_train.stages.context import Context
from dist_train.training.evaluate import Evaluation
from dist_train.training.hooks import Hook
from dist_train.training.loop import Fit, fit
from dist_train.training.profiler import NoProfile, Profile
from dist_train.training.recalibration import Autocast, estimate_moments
from dist_train.training.reduction import StepReduction
from dist_train.training.state import TrainState


class Train(Stage):
    """Trains the float model."""

    settings: TrainConfig

    def run(self, context: Context) -> dict[str, Any]:
        reduction = StepReduction(context.world, context.model)
        evaluate = LastEvaluation(context.evaluate)
        with _batch_norms(context):
            state = run_loop(
                context,
                self.name,
                self.settings,
                context.model,
                reduction,
                lambda total_steps: [],
                evaluate,
                lambda averaged: estimate_moments(averaged, *estimation(context, self.settings)),
            )
        context.results["models"]["fp32"] = dict(state.metrics)
        context.keep_details("fp32", evaluate.of(state))
        return {"model": state.chosen.state_dict()}

    def restore(self, context: Context, product: dict[str, Any]) -> None:
        context.model.load_state_dict(product["model"])
        context.model.eval()


def _batch_norms(context: Context) -> AbstractContextManager[None]:
    """Synchronised ones while training, where that is asked for and there is another rank. Their state is that of plain ones."""
    if context.config.sync_batchnorm and context.world.world_size > 1:
        return synchronised_batch_norms(context.model, context.world)
    return nullcontext()


class LastEvaluation:
    """An evaluation that is remembered, because its details are wanted of the last one only."""

    def __init__(self, evaluate: Callable[[nn.Module], Evaluation]) -> None:
        self._evaluate = evaluate
        self._last: Evaluation | None = None

    def __call__(self, model: nn.Module) -> Evaluation:
        self._last = self._evaluate(model)
        return self._last

    def of(self, state: TrainState) -> Evaluation:
        """The evaluation of the chosen model; made again where the loop chose an earlier one. Collective."""
        if self._last is None or self._last.metrics != state.metrics:
            return self(state.chosen)
        return self._last


def run_loop(
    context: Context,
    stage: str,
    settings: FitConfig,
    model: nn.Module,
    reduction: StepReduction,
    hooks: Callable[[int], Sequence[Hook]],
    evaluate: Callable[[nn.Module], Evaluation],
    reestimate: Callable[[nn.Module], None],
) -> TrainState:
    """Runs the loop for a stage; `hooks` is given the stage's number of steps, `reestimate` a moving average before it is evaluated.

    Raises:
        DataError: an epoch has no step.
    """
    config, progress = context.config, context.progress
    settings = _for_this_batch(context, stage, settings)
    loader = context.train_loader(stage)
    steps, epochs = loader.steps_per_epoch, settings.epochs
    if steps == 0:
        raise DataError(
            f"{context.train_samples} samples to train on make no complete global batch of {config.data.global_batch_size}, "
            "and data.drop_last is true",
            "--data.drop_last false, or a smaller --data.global_batch_size",
        )
    if config.debug.fast_dev_run:
        steps, epochs = min(steps, 2), 1
    else:
        for problem in idle_settings(stage, settings, epochs, steps):
            progress.warn(str(problem))
    progress.data_hint = _data_hint(context)
    run = Fit(
        stage=stage,
        seed=config.run.seed,
        config=settings,
        epochs=epochs,
        steps_per_epoch=steps,
        loader=loader,
        task=context.task,
        strategy=context.strategy,
        reduction=reduction,
        hooks=hooks(epochs * steps),
        evaluate=evaluate,
        checkpoints=context,
        checkpoint_every=config.checkpoint.every_steps,
        ledger=context.ledger,
        trackers=context.trackers,
        log_every=config.log.every_steps,
        progress=progress,
        compile=config.compile,
        epoch_format=config.log.epoch_format,
        reestimate=reestimate,
        profile=_profile(context, stage),
    )
    state = fit(run, model, context.resume)
    context.results["stages"].setdefault(stage, {}).update(_outcome(run, state))
    return state


def estimation(context: Context, settings: FitConfig) -> tuple[EstimationLoader, World, Autocast]:
    """What the statistics of a moving average are estimated from, and how."""
    batches = estimation_batches(context, settings.ema_samples, context.config.data.eval_batch_size)
    return batches, context.world, context.strategy.autocast


def estimation_batches(context: Context, samples: int, rows: int) -> EstimationLoader:
    """This rank's batches of `rows` of as many training samples, drawn by the seed: over all ranks the same at any world size."""
    config, world = context.config, context.world
    return EstimationLoader(
        context.source(context.splits.train, config.run.seed),
        2 * config.data.eval_batch_size if config.debug.fast_dev_run else samples,
        rows,
        config.run.seed,
        world.world_size,
        world.rank,
        shuffle=context.splits.steps_per_epoch is None,
    )


def _for_this_batch(context: Context, stage: str, settings: FitConfig) -> FitConfig:
    """The settings with the learning rate of this global batch, said in a line where it is scaled."""
    batch, optim = context.config.data.global_batch_size, settings.optim
    if optim.base_batch_size is None:
        return settings
    scaled = optim.scaled(batch)
    context.progress.say(f"{stage}: lr {scaled.lr:.6g} = {optim.lr:g} x {batch} / {optim.base_batch_size}")
    return settings.model_copy(update={"optim": scaled})


def _profile(context: Context, stage: str) -> Profile | NoProfile:
    wanted = context.config.profile
    if wanted is None or not context.world.is_main:
        return NoProfile()
    first, last = wanted.steps
    return Profile(stage, first, last, context.run_dir.profile_of(stage), context.progress.say)


def _data_hint(context: Context) -> str:
    """What to type where the loop waits for its data."""
    if isinstance(context.splits.train, ImageArrays):
        return "image arrays are augmented between the steps: fewer data.augment, or more --run.threads_per_rank"
    share = context.world.share_of_cores()
    if context.workers < share:
        return f"--data.workers {share}, this rank's share of the cores; it is {context.workers}"
    return f"--data.workers is {context.workers}, this rank's share of the cores: more cores, or samples that cost less to make"


def _outcome(run: Fit, state: TrainState) -> dict[str, Any]:
    """What results.json says of a stage that trained: steps and epochs done, and what was chosen, where there was a choice."""
    outcome: dict[str, Any] = {"steps": state.step, "epochs": state.step // run.steps_per_epoch}
    if state.skipped:
        outcome["skipped_steps"] = state.skipped
    if run.config.early_stopping is not None:
        outcome["stopped_early"] = state.selection.stop and state.step < run.total_steps
    if run.config.select == "best":
        outcome["selected"] = {
            "step": state.chosen_step,
            "epoch": state.chosen_step // run.steps_per_epoch,
            "by": state.selection.metric,
            "value": state.metrics[state.selection.metric],
        }
    return outcome
