"""Float training, and what it shares with quantization-aware training: a run of the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from dist_train.config_fit import FitConfig, TrainConfig
from dist_train.errors import DataError
from dist_train.evaluate import Evaluation
from dist_train.hooks import Hook
from dist_train.loop import Fit, fit
from dist_train.reduction import StepReduction
from dist_train.stages.base import Context, Stage
from dist_train.state import TrainState


class Train(Stage):
    """Trains the float model."""

    settings: TrainConfig

    def run(self, context: Context) -> dict[str, Any]:
        reduction = StepReduction(context.world, context.model)
        state = run_loop(
            context, self.name, self.settings, context.model, reduction, lambda total_steps: [], context.evaluate
        )
        context.results["models"]["fp32"] = dict(state.metrics)
        return {"model": state.chosen.state_dict()}

    def restore(self, context: Context, product: dict[str, Any]) -> None:
        context.model.load_state_dict(product["model"])
        context.model.eval()


def run_loop(
    context: Context,
    stage: str,
    settings: FitConfig,
    model: nn.Module,
    reduction: StepReduction,
    hooks: Callable[[int], Sequence[Hook]],
    evaluate: Callable[[nn.Module], Evaluation],
) -> TrainState:
    """Runs the loop for a stage; `hooks` is given the stage's number of steps.

    Raises:
        DataError: an epoch has no step.
    """
    config = context.config
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
        progress=context.progress,
        compile=config.compile,
    )
    state = fit(run, model, context.resume)
    context.results["stages"].setdefault(stage, {})["steps"] = run.total_steps
    return state
