"""The sections of the stages: `train`, `half`, `ptq`, `qat`, `convert`, `export`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from dist_train import registry
from dist_train.config.base import MAY_CHANGE_ON_RESUME, Fraction, Momentum, Registered, Settings


def steps_in(fraction: float, total_steps: int) -> int:
    """The whole steps in a fraction of a stage: of warm-up, or before something freezes."""
    return round(fraction * total_steps)


class OptimConfig(Settings):
    name: Literal["sgd", "adam", "adamw"] = "sgd"
    """torch.optim's SGD, Adam or AdamW."""
    lr: PositiveFloat = 0.1
    """Highest learning rate of the schedule."""
    base_batch_size: PositiveInt | None = None
    """Global batch size that `lr` is meant for: it is scaled by global_batch_size / base_batch_size (Goyal et al. 2017, arXiv:1706.02677). None: `lr` as it is."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD only."""
    nesterov: bool = False
    """SGD only."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    """Adam and AdamW only."""
    eps: PositiveFloat = 1e-8
    """Adam and AdamW only."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of the weights of two and more dimensions; Adam adds it to the gradient, AdamW takes it from the weight."""
    decay_norm_and_bias: bool = False
    """Decay one-dimensional parameters (norms, biases) too."""

    def scaled(self, global_batch_size: int) -> OptimConfig:
        """These settings with the `lr` that is right for this batch: the linear rule, where base_batch_size is given."""
        if self.base_batch_size is None:
            return self
        return self.model_copy(update={"lr": self.lr * global_batch_size / self.base_batch_size})


class QATOptimConfig(OptimConfig):
    lr: PositiveFloat = 0.001
    """Highest learning rate of the schedule."""


class ScheduleConfig(Settings):
    name: Literal["constant", "step", "cosine", "linear"] = "cosine"
    """Learning rate over the steps of a stage, after the warm-up."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the steps over which the rate rises linearly from 1 % of lr."""
    final: Fraction = 0.0
    """cosine, linear: the last learning rate, as a fraction of lr."""
    step_epochs: PositiveFloat = 30.0
    """step: epochs between two decays."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """step: factor of a decay."""


class EarlyStoppingConfig(Settings):
    patience: PositiveInt
    """Evaluations in a row without an improvement after which the stage ends."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Least improvement of `select_by` that counts."""


class FitConfig(Settings):
    """What train and qat share: both run the same loop."""

    epochs: PositiveInt = 1
    """Passes over the training set."""
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    clip_grad_norm: PositiveFloat | None = None
    """Largest L2 norm of all gradients together."""
    ema_decay: Annotated[float | None, Field(gt=0, lt=1)] = None
    """Keep an exponential moving average of the parameters with this decay a step; it is what is evaluated and handed on."""
    ema_samples: PositiveInt = 2048
    """Training samples, over all ranks and without augmentation, from which BatchNorm's statistics and the ranges of the averaged model are estimated before each evaluation; those that qat has frozen are kept."""
    evaluate_every: PositiveInt = 1
    """Epochs between two evaluations; the last epoch is always followed by one."""
    select: Literal["last", "best"] = "last"
    """Which epoch's model is handed on."""
    select_by: str | None = None
    """Metric of the evaluation that says which epoch is best, such as top1 or loss; None: the task's own."""
    early_stopping: EarlyStoppingConfig | None = None
    """End the stage when `select_by` no longer improves."""


class TrainConfig(FitConfig):
    epochs: PositiveInt = 10
    """Passes over the training set."""


class HalfConfig(Settings):
    dtype: Literal["auto", "bf16", "fp16"] = "auto"
    """auto: bf16 where the CPU or GPU computes in it, else fp16."""


class PTQConfig(Settings):
    samples: PositiveInt = 512
    """Training samples, over all ranks, from which the ranges are initialised: drawn by the seed, of a stream the first ones."""
    ranges: Literal["min_max", "percentile", "mse"] = "min_max"
    """min_max: the smallest and largest value; percentile, mse: clipped, by a second pass that counts the values in bins."""
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    """percentile: at most 100 minus this many percent of the values are clipped at either end."""


Bits = Annotated[int, Field(ge=2, le=8)]


class WeightQuantizationConfig(Settings):
    bits: Bits = 8
    """Below 8 the integers are simulated in int8 (pt2e only)."""
    scheme: Literal["symmetric", "affine"] = "symmetric"
    """affine: with a zero point, so that the smallest and largest weight take all integers (pt2e only; for OpenVINO and ONNX Runtime, as the kernels of Inductor and XNNPACK take no zero point)."""
    granularity: Literal["channel", "tensor"] = "channel"
    """A scale for each output channel, or one for all."""


class ActivationQuantizationConfig(Settings):
    bits: Bits = 8
    """Below 8 the integers are simulated in uint8."""
    scheme: Literal["affine", "symmetric"] = "affine"
    """symmetric: 0 is the middle integer."""
    granularity: Literal["tensor", "channel"] = "tensor"
    """channel is refused: no backend has integer kernels for it."""


class TypeMatch(Settings):
    type: str
    """Class names, as a pattern like `Conv*`; subclasses match too."""


class RuleConfig(Settings):
    match: str | TypeMatch
    """Module names, as a pattern like `layer4.*.conv2`, or `{type: Conv2d}`; a match holds for what is inside the module, too."""
    weight: WeightQuantizationConfig | None = None
    """How their weights are quantized."""
    activation: ActivationQuantizationConfig | None = None
    """How what enters them is quantized (pt2e only)."""
    skip: bool = False
    """Leave these modules in floating point."""


class QATConfig(FitConfig):
    backend: Annotated[str, Registered(registry.quantization_backends)] = "pt2e"
    """Serves ptq and convert too."""
    engine: Literal["auto", "x86", "fbgemm", "onednn", "qnnpack"] = "auto"
    """Integer kernels that the fx and eager backends are made for; auto: x86 on x86-64, qnnpack on ARM. pt2e ignores it."""
    epochs: PositiveInt = 2
    """Passes over the training set."""
    optim: QATOptimConfig = QATOptimConfig()
    budget: Annotated[float | None, Field(ge=0)] = None
    """Points (0.01) of the task's metric that ptq may lose against FP32: where it loses no more, qat is left out. None: qat always trains."""
    always: bool = False
    """Train although ptq is within the budget, which is only said."""
    observer: Literal["moving_average", "min_max"] = "moving_average"
    """How the ranges follow the steps: by an exponential moving average, or as the smallest and largest value so far."""
    dropout: bool = False
    """Whether the model's dropout drops out in this stage too. Off is what the literature recommends for so few steps."""
    select_by: str | None = None
    """Metric of the evaluation that says which epoch is best, such as top1; int8_top1, int8_loss, ...: of the model converted to int8 after each evaluation, which costs a conversion and a second evaluation. None: the task's own."""
    averaging: Annotated[float, Field(gt=0, le=1)] = 0.05
    """moving_average: weight of a step's range."""
    freeze_batch_norm: Fraction = 0.3
    """Fraction of the steps after which BatchNorm's statistics stand still."""
    freeze_ranges: Fraction = 0.5
    """Fraction of the steps after which the ranges stand still."""
    prepare_bound: Annotated[PositiveFloat, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = 1e-4
    """Gate: largest relative difference of the prepared model, fake quantization off, from the float one."""
    rules: list[RuleConfig] = []
    """Modules that are quantized otherwise, or left in floating point: the first rule that matches a module holds."""

    @property
    def simulated_bits(self) -> list[int]:
        """Returns the widths below 8 that the rules ask for, ascending: no kernel has them, so int8 simulates them."""
        parts = [part for rule in self.rules for part in (rule.weight, rule.activation) if part is not None]
        return sorted({part.bits for part in parts if part.bits < 8})


class ConvertConfig(Settings):
    deadline: Annotated[PositiveFloat, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = 900.0
    """Seconds that the ranks wait for rank 0 to convert."""
    agreement_bound: Annotated[Fraction, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = 0.99
    """Gates: least share of the evaluation set on which int8, in process and in its runtime, and fake-quant choose the same class."""
    runtime: Annotated[
        Literal["auto", "openvino", "onnxruntime", "none"], Field(json_schema_extra=MAY_CHANGE_ON_RESUME)
    ] = "auto"
    """Runtime that int8 is judged in besides the program in process; auto: OpenVINO or ONNX Runtime, the first that is installed. fx and eager bring their own."""


class ExportConfig(Settings):
    formats: Annotated[
        list[Literal["auto", "pt2", "onnx", "openvino", "executorch"]],
        Field(min_length=1, json_schema_extra=MAY_CHANGE_ON_RESUME),
    ] = ["pt2"]
    """Files to write beside the program itself, which is always there (pt2; TorchScript for the fx and eager backends). auto: the one whose runtime is the fastest on rank 0's machine, of those installed."""
    models: Annotated[list[Literal["fp32", "half", "int8"]] | None, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = (
        None
    )
    """Models to export, the first one as `model.*`; None: int8 where `convert` ran, else half, else fp32."""
    latency: bool = True
    """Time the FP32, the half and the int8 model on rank 0, in the same runtime where it is right for them."""
    latency_batch_sizes: list[PositiveInt] = [1, 32]
    deadline: Annotated[PositiveFloat, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = 900.0
    """Seconds that the ranks wait for rank 0 to export."""
    agreement_samples: Annotated[PositiveInt | None, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = 1024
    """Gate of each int8 format: samples of the evaluation set, drawn by the seed, on which it must decide in its runtime as the int8 model in process does, by `convert.agreement_bound`. None: all of them."""
    artifact_bound: Annotated[float, Field(ge=0, json_schema_extra=MAY_CHANGE_ON_RESUME)] = 1e-5
    """Gate: largest difference of the artifact's outputs, loaded in a fresh process, from those of the models in memory."""
    size_bound: Annotated[PositiveFloat | None, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = None
    """Gate: most bytes of the int8 program for each byte of the FP32 parameters and buffers, such as 0.27; None: no gate, as the fixed part of a program is most of a small model's."""
