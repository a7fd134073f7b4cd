"""The typed tree of the configuration. Everything in it is data: names are looked up in registries, nothing is run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PositiveFloat,
    PositiveInt,
    create_model,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from dist_train import registry

# A field marked FREE does not determine the result: it may change when a run is resumed.
FREE: dict[str, Any] = {"determines_result": False}
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Settings(BaseModel):
    """Base of every section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, ser_json_inf_nan="constants"
    )


@dataclass(frozen=True)
class Registered:
    """Annotation of a text that must be a registered name, or one of `also`; editors complete from the names."""

    names: registry.Registry
    also: tuple[str, ...] = ()

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "examples": [*self.also, *self.names.names()]}

    def _check(self, name: str) -> str:
        if name in self.names or name in self.also:
            return name
        found = {"kind": self.names.kind, "name": name, "suggestion": self.names.suggestion(name, self.also)}
        raise PydanticCustomError("unknown_name", "unknown {kind} '{name}'; {suggestion}", found)


class RunConfig(Settings):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", json_schema_extra=FREE)] = "run"
    """Name of the run; the run directory is runs/<name> unless `dir` says otherwise."""
    dir: Annotated[Path | None, Field(json_schema_extra=FREE)] = None
    """Run directory. On several nodes it must be on a file system that all of them share."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the initial weights, the order of the samples, the augmentation and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is a device for each rank of the node, else the CPU."""
    threads_per_rank: PositiveInt | Literal["auto"] = "auto"
    """CPU threads of each rank; auto: the cores shared out at the first start, and kept from then on, because results differ by it in the last bits."""
    deterministic: bool = True
    """Use deterministic kernels, which resuming to the bit needs; costs speed on GPUs."""
    timeout: Annotated[PositiveFloat, Field(json_schema_extra=FREE)] = 1800.0
    """Seconds after which a collective or a wait for rank 0 fails."""


class RandomCrop(Settings):
    name: Literal["random_crop"] = "random_crop"
    padding: Annotated[int, Field(ge=1)] = 4
    """Zero pixels added on each side before a window of the original size is cut out."""


class RandomHorizontalFlip(Settings):
    name: Literal["random_horizontal_flip"] = "random_horizontal_flip"
    p: Fraction = 0.5


class ColorJitter(Settings):
    name: Literal["color_jitter"] = "color_jitter"
    brightness: Annotated[float, Field(ge=0)] = 0.0
    contrast: Annotated[float, Field(ge=0)] = 0.0
    saturation: Annotated[float, Field(ge=0)] = 0.0


AugmentConfig = Annotated[RandomCrop | RandomHorizontalFlip | ColorJitter, Field(discriminator="name")]


class DataConfig(Settings):
    name: Annotated[str, Registered(registry.datasets)] = "digits"
    """Name of a registered dataset."""
    args: dict[str, Any] = {}
    """Arguments of the dataset's function."""
    root: Annotated[Path | None, Field(json_schema_extra=FREE)] = None
    """Folder of the dataset's files, where it has any."""
    cache_dir: Annotated[Path | None, Field(json_schema_extra=FREE)] = None
    """Node-local folder of the memory-mapped arrays; default: dist_train in the user's cache folder."""
    global_batch_size: PositiveInt = 64
    """Samples of one optimizer step, over all ranks."""
    micro_batch_size: Annotated[int, Field(ge=2)] | None = None
    """Most samples of one forward on one rank; more are accumulated. None: a rank's whole share."""
    eval_batch_size: PositiveInt = 256
    """Samples of one forward in evaluation, on each rank."""
    drop_last: bool = False
    """Leave out the last, partial global batch of an epoch."""
    augment: list[AugmentConfig] = []
    """Augmentation of image arrays, in order; normalization follows always."""
    workers: Annotated[int, Field(ge=0, json_schema_extra=FREE)] = 0
    """Worker processes for map-style datasets; image arrays need none."""


class ModelConfig(Settings):
    name: Annotated[str, Registered(registry.models)] = "small_resnet"
    """Name of a registered model, or of a classification model of torchvision."""
    args: dict[str, Any] = {}
    """Arguments of the model's function; num_classes and in_channels are given by the data where the function takes them."""
    channels_last: bool = False
    """Keep 4-dimensional weights and inputs in channels_last memory format."""


class TaskConfig(Settings):
    name: Annotated[str, Registered(registry.tasks)] = "classification"
    args: dict[str, Any] = {}
    """Arguments of the task, for example label_smoothing."""


class OptimConfig(Settings):
    name: Literal["sgd", "adamw"] = "sgd"
    lr: PositiveFloat = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD only."""
    nesterov: bool = False
    """SGD only."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    """AdamW only."""
    eps: PositiveFloat = 1e-8
    """AdamW only."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    decay_norm_and_bias: bool = False
    """Decay one-dimensional parameters (norms, biases) too."""


class QATOptimConfig(OptimConfig):
    lr: PositiveFloat = 0.001


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


class FitConfig(Settings):
    """What train and qat share: both run the same loop."""

    epochs: PositiveInt = 1
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    clip_grad_norm: PositiveFloat | None = None
    """Largest L2 norm of all gradients together."""
    ema_decay: Annotated[float | None, Field(gt=0, lt=1)] = None
    """Keep an exponential moving average of the parameters with this decay a step; it is what is evaluated and handed on."""
    evaluate_every: PositiveInt = 1
    """Epochs between two evaluations; the last epoch is always followed by one."""
    select: Literal["last", "best"] = "last"
    """Which epoch's model is handed on."""


class TrainConfig(FitConfig):
    epochs: PositiveInt = 10


class PTQConfig(Settings):
    samples: PositiveInt = 512
    """Training samples, over all ranks, from which the ranges are initialised."""


class RuleConfig(Settings):
    match: str
    """Module names, as a pattern like `layer4.*.conv2`."""
    skip: Literal[True] = True
    """Leave these modules in floating point."""


class QATConfig(FitConfig):
    backend: Annotated[str, Registered(registry.quantization_backends)] = "pt2e"
    """Serves ptq and convert too."""
    epochs: PositiveInt = 2
    optim: QATOptimConfig = QATOptimConfig()
    averaging: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Weight of a step's range in the moving average."""
    freeze_batch_norm: Fraction = 0.3
    """Fraction of the steps after which BatchNorm's statistics stand still."""
    freeze_ranges: Fraction = 0.5
    """Fraction of the steps after which the ranges stand still."""
    prepare_bound: Annotated[PositiveFloat, Field(json_schema_extra=FREE)] = 1e-4
    """Gate: largest relative difference of the prepared model, fake quantization off, from the float one."""
    rules: list[RuleConfig] = []


class ConvertConfig(Settings):
    deadline: Annotated[PositiveFloat, Field(json_schema_extra=FREE)] = 900.0
    """Seconds that the ranks wait for rank 0 to convert."""
    agreement_bound: Annotated[Fraction, Field(json_schema_extra=FREE)] = 0.99
    """Gate: least share of the evaluation set on which int8 and fake-quant choose the same class."""


class ExportConfig(Settings):
    formats: Annotated[list[Literal["pt2"]], Field(min_length=1)] = ["pt2"]
    latency: bool = True
    """Time the FP32 and the int8 model in the same runtime on rank 0."""
    latency_batch_sizes: list[PositiveInt] = [1, 32]
    deadline: Annotated[PositiveFloat, Field(json_schema_extra=FREE)] = 900.0
    """Seconds that the ranks wait for rank 0 to export."""
    artifact_bound: Annotated[float, Field(ge=0, json_schema_extra=FREE)] = 1e-5
    """Gate: largest difference of the artifact's outputs, loaded in a fresh process, from the converted model's."""


class CheckpointConfig(Settings):
    every_steps: Annotated[PositiveInt | None, Field(json_schema_extra=FREE)] = None
    """Optimizer steps between two checkpoints; None: at the ends of epochs only."""
    keep_last: Annotated[PositiveInt, Field(json_schema_extra=FREE)] = 2
    """Checkpoints within a stage that are kept, beside the best one and those of finished stages."""


class LogConfig(Settings):
    every_steps: Annotated[PositiveInt, Field(json_schema_extra=FREE)] = 10
    """Steps between two lines of metrics.jsonl."""
    interval: Annotated[PositiveFloat, Field(json_schema_extra=FREE)] = 5.0
    """Seconds between two printed lines where there is no terminal."""


class DebugConfig(Settings):
    ledger: bool = False
    """Write which samples every rank consumed at every step."""
    fast_dev_run: bool = False
    """Two batches of every stage, in a run directory of its own."""


class Config(Settings):
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    strategy: Annotated[str, Registered(registry.strategies, ("auto",))] = "auto"
    """auto: single for one process, ddp for several."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast of forward and loss; parameters stay FP32."""
    compile: bool = False
    """torch.compile the model."""
    stages: Annotated[list[Annotated[str, Registered(registry.stages)]], Field(min_length=1)] = [
        "train",
        "ptq",
        "qat",
        "convert",
        "export",
    ]
    """Names of stages, in order; each stage's settings are the section of its name."""
    train: TrainConfig = TrainConfig()
    ptq: PTQConfig = PTQConfig()
    qat: QATConfig = QATConfig()
    convert: ConvertConfig = ConvertConfig()
    export: ExportConfig = ExportConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    debug: DebugConfig = DebugConfig()
    trackers: Annotated[list[Annotated[str, Registered(registry.trackers)]], Field(json_schema_extra=FREE)] = ["jsonl"]

    @property
    def run_dir(self) -> Path:
        base = self.run.dir or Path("runs") / self.run.name
        if not self.debug.fast_dev_run:
            return base
        named = base if base.name not in ("", "..") else base.resolve()  # "." has no name
        return named.with_name(named.name + "-fast-dev-run")


def config_model(stages: list[str]) -> type[Config]:
    """Config, with a section for each third-party stage named in `stages` that registered settings."""
    sections: dict[str, Any] = {}
    for name in stages:
        if name not in Config.model_fields and name in registry.stages:
            settings = registry.stages.settings(name)
            if settings is not None:
                required = any(info.is_required() for info in settings.model_fields.values())
                sections[name] = (settings, ... if required else Field(default_factory=settings))
    return create_model("Config", __base__=Config, **sections) if sections else Config


def leaves(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Each setting as (dotted key, JSON value, does it determine the result), in the tree's order."""
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
            yield (
                prefix + name,
                config.model_dump(mode="json", include={name})[name],
                extra.get("determines_result", True) is not False,
            )
