"""The settings that train and qat share: optimizer, schedule, what learns, and the choice of an epoch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat

from dist_train import registry
from dist_train.config.base import Count, Fraction, Momentum, Rate, Registered, Settings
from dist_train.registry.torch_names import FUSED_OPTIMIZERS, OWN_SCHEDULES, REFUSED_OPTIMIZERS, REFUSED_SCHEDULES


def steps_in(fraction: float, total_steps: int) -> int:
    """Returns the whole steps of a fraction of a stage: of its warm-up, or before a freeze."""
    return round(fraction * total_steps)


WeightDecay = Annotated[float, Field(ge=0, le=1e6)]


class TypeMatch(Settings):
    type: str
    """Class names, as a pattern like `Conv*`; subclasses match too."""


Match = str | TypeMatch


class GroupConfig(Settings):
    match: Match
    """Parameters or modules, as a pattern like `head.*` or `*.bias`, or `{type: BatchNorm*}`. A match includes all
    parameters inside."""
    name: Annotated[str, Registered(registry.optimizers, refused=REFUSED_OPTIMIZERS)] | None = None
    """Another optimizer for them, as adamw beside Muon, which takes matrices alone. None: the section's."""
    lr: Rate | None = None
    """Their highest learning rate; it follows the schedule as the base rate does, and is scaled by `base_batch_size`.
    None: the section's."""
    weight_decay: WeightDecay | None = None
    """None: the section's."""
    decay_norm_and_bias: bool | None = None
    """None: the section's."""
    args: dict[str, Any] = {}
    """Other settings of the optimizer for them, by torch's names: {"betas": [0.9, 0.98]}."""


class OptimConfig(Settings):
    name: Annotated[str, Registered(registry.optimizers, refused=REFUSED_OPTIMIZERS)] = "sgd"
    """sgd, adam, adamw: in torch's fused kernels, with the settings here. A class of torch.optim by its own name, such
    as RAdam, or a registered optimizer: with `args`."""
    lr: Rate = 0.1
    """Highest learning rate of the schedule."""
    base_batch_size: Count | None = None
    """Global batch size that `lr` is meant for: `lr` is scaled by global_batch_size / base_batch_size (Goyal et al.
    2017, arXiv:1706.02677). None: `lr` as it is."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """sgd only."""
    nesterov: bool = False
    """sgd only."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    """adam and adamw only."""
    eps: Rate = 1e-8
    """adam and adamw only."""
    weight_decay: WeightDecay = 0.0
    """Decay of weights with two and more dimensions: added to the gradient by Adam, taken from the weight by AdamW."""
    decay_norm_and_bias: bool = False
    """Decay one-dimensional parameters (norms, biases) too."""
    args: dict[str, Any] = {}
    """Arguments of a torch.optim class or of a registered optimizer, beside lr and weight_decay."""
    groups: list[GroupConfig] = []
    """Parameters with other settings. The first group that matches a parameter counts."""

    @property
    def own(self) -> bool:
        """True for sgd, adam and adamw, which have settings of their own."""
        return self.name in FUSED_OPTIMIZERS

    def scaled(self, global_batch_size: int) -> OptimConfig:
        """Returns these settings with each `lr` scaled to the batch by the linear rule, if base_batch_size is given."""
        base = self.base_batch_size
        if base is None:
            return self
        groups = [
            group if group.lr is None else group.model_copy(update={"lr": group.lr * global_batch_size / base})
            for group in self.groups
        ]
        return self.model_copy(update={"lr": self.lr * global_batch_size / base, "groups": groups})


class ScheduleConfig(Settings):
    name: Annotated[str, Registered(registry.schedules, refused=REFUSED_SCHEDULES)] = "cosine"
    """Learning rate over the steps of a stage, after the warm-up. constant, step, cosine, linear: with the settings
    here. A class of torch.optim.lr_scheduler by its own name, such as OneCycleLR, or a registered schedule: with
    `args`."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the steps over which the rate rises linearly from 1 % of the schedule's first rate."""
    final: Fraction = 0.0
    """cosine, linear: the last learning rate, as a fraction of lr."""
    step_epochs: Annotated[float, Field(gt=0, lt=2**31)] = 30.0
    """step: epochs between two decays."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """step: factor of a decay."""
    args: dict[str, Any] = {}
    """Arguments of a torch.optim.lr_scheduler class or of a registered schedule. Where they are left out, total_steps
    and T_max, and total_iters of PolynomialLR, are all steps (or epochs) after the warm-up, and OneCycleLR's max_lr is
    the section's lr."""
    every: Literal["step", "epoch"] = "step"
    """Unit that such a schedule counts. ReduceLROnPlateau counts evaluations."""
    metric: str | None = None
    """ReduceLROnPlateau: metric of the evaluation, as in `select_by`. None: that of `select_by`. Its `mode` follows
    from the metric."""

    @property
    def own(self) -> bool:
        """True for the schedules that have settings of their own."""
        return self.name in OWN_SCHEDULES


class EarlyStoppingConfig(Settings):
    patience: Count
    """Evaluations in a row without an improvement after which the stage ends."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Least improvement of `select_by` that counts."""


class FitConfig(Settings):
    """Settings of train and qat: both run the same loop."""

    epochs: Count = 1
    """Passes over the training set."""
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    freeze: list[Match] | None = None
    """Parameters or modules that do not learn, as patterns like `backbone.*`, or `{type: BatchNorm*}`. A match includes
    all inside; its batch norms keep their statistics."""
    unfreeze_at: Count | None = None
    """Epoch, counted from 0, from which on they learn. None: never."""
    activation_checkpointing: Match | list[Match] = []
    """Modules whose activations are not kept for backward, which computes them anew: less memory, a second forward.
    Patterns as in `freeze`; of what they match, the outermost modules."""
    clip_grad_norm: PositiveFloat | None = None
    """Largest L2 norm of all gradients together."""
    ema_decay: Annotated[float | None, Field(gt=0, lt=1)] = None
    """Decay a step of an exponential moving average of the parameters; the average is evaluated and handed on."""
    ema_samples: Count = 2048
    """Training samples, over all ranks and without augmentation, that give BatchNorm's statistics and the ranges of the
    averaged model before each evaluation. Statistics and ranges that qat has frozen are kept."""
    evaluate_every: Count = 1
    """Epochs between two evaluations; the last epoch is always followed by one."""
    select: Literal["last", "best"] = "last"
    """Epoch whose model is handed on."""
    select_by: str | None = None
    """Metric of the evaluation that decides which epoch is best: top1, loss, ...; None: the task's own."""
    early_stopping: EarlyStoppingConfig | None = None
    """End the stage when `select_by` no longer improves."""
