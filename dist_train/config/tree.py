"""The typed tree of the configuration. It is data: names are looked up in registries, and nothing is run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, create_model

from dist_train import registry
from dist_train.addresses import local_copy, place
from dist_train.config.base import MAY_CHANGE_ON_RESUME, Address, Count, Registered, Seconds, Settings
from dist_train.config.data import DataConfig, ModelConfig, TaskConfig
from dist_train.config.fit import Match
from dist_train.config.stages import ConvertConfig, ExportConfig, HalfConfig, PTQConfig, QATConfig, TrainConfig


class RunConfig(Settings):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", json_schema_extra=MAY_CHANGE_ON_RESUME)] = "run"
    """Name of the run; the run directory is runs/<name> unless `dir` is given."""
    dir: Annotated[Address | Path | None, BeforeValidator(place), Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = None
    """Run directory: a folder, or an address at an object store, as s3://bucket/runs/x. For several nodes a folder must
    be on a file system that all of them share."""
    spool: Annotated[Path | None, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = None
    """Folder of the working copies of runs whose `dir` is an address; None: dist_train/runs in the user's cache. For
    several nodes it must be on a file system that all of them share."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the initial weights, the order of the samples, the augmentation and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is a device for each rank of the node, else the CPU."""
    threads_per_rank: Annotated[int, Field(gt=0, le=4096)] | Literal["auto"] = "auto"
    """CPU threads of each rank; auto: the cores divided among the ranks at the first start. The number is kept from
    then on, because results depend on it in the last bits."""
    deterministic: bool = True
    """Use deterministic kernels, which bit-exact resuming needs; costs speed on GPUs."""
    timeout: Annotated[Seconds, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = 1800.0
    """Seconds after which a collective or a wait for rank 0 fails; at least `watchdog.timeout`, which tells a rank that
    is slow from one that is stuck."""


class KeepConfig(Settings):
    last: Annotated[Count, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = 2
    """Newest checkpoints within a stage."""
    best: Annotated[int, Field(ge=0, lt=2**31, json_schema_extra=MAY_CHANGE_ON_RESUME)] = 1
    """Best evaluated checkpoints, by `select_by`; the one that `select: best` hands on is kept anyway."""
    every_hours: Annotated[float | None, Field(gt=0, le=1e6, json_schema_extra=MAY_CHANGE_ON_RESUME)] = None
    """Hours of wall clock between two checkpoints that are kept until the stage ends."""
    training: Annotated[bool, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = True
    """Keep the optimizer's state at the end of `train`, from which `train.extend_from` of another run goes on. It takes
    up to two or three times the room of the model."""


class CheckpointConfig(Settings):
    every_steps: Annotated[Count | None, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = None
    """Optimizer steps between two checkpoints; None: at the ends of epochs only."""
    asynchronous: Annotated[bool, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = True
    """Train on while a checkpoint is written: rank 0 copies the state, which takes that much memory, and a thread
    writes the copy. false: all ranks wait until it is on the disk."""
    retry: Annotated[float, Field(ge=0, json_schema_extra=MAY_CHANGE_ON_RESUME)] = 60.0
    """Seconds that writing a checkpoint, the ledger or the final results is tried again, where the disk is full or does
    not answer; then the run ends, and the last checkpoint stays."""
    keep: KeepConfig = KeepConfig()
    """Checkpoints within a stage that are kept; the last one of a finished stage always is."""


class StopConfig(Settings):
    grace: Annotated[Seconds, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = 30.0
    """Most seconds from the request to stop (SIGTERM, SIGUSR2, a file STOP in the run directory) to the end. A step, an
    evaluation or a conversion that takes longer is abandoned, and the run resumes from the last checkpoint."""


class WatchdogConfig(Settings):
    timeout: Annotated[Seconds | None, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = 600.0
    """Seconds without progress of a rank after which the run ends, and names the stuck rank and its phase. Set-up,
    convert and export have longer deadlines of their own. None: never."""


class LogConfig(Settings):
    every_steps: Annotated[Count, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = 10
    """Steps between two lines of metrics.jsonl."""
    interval: Annotated[Seconds, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = 5.0
    """Seconds between two printed lines without a terminal."""
    epoch_format: Annotated[str | None, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = None
    """Format of the line after each evaluation, with the fields stage, epoch, epochs and the metrics: "Epoch
    [{epoch}/{epochs}], Acc: {top1:.4%}"."""


class ProfileConfig(Settings):
    steps: Annotated[
        list[Annotated[int, Field(ge=0, lt=2**31)]],
        Field(min_length=2, max_length=2, json_schema_extra=MAY_CHANGE_ON_RESUME),
    ]
    """Optimizer steps [first, last) of each training stage that torch.profiler records."""


class WandbConfig(Settings):
    """For `trackers: [wandb]`."""

    project: Annotated[str, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = "dist_train"
    entity: Annotated[str | None, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = None
    mode: Annotated[Literal["auto", "online", "offline"], Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = "auto"
    """auto: WANDB_MODE, else online if an API key is configured, else offline."""
    tags: Annotated[list[str], Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = []


class SizeMatch(Settings):
    min_params: Count
    """All modules with more parameters than this."""


class FSDPConfig(Settings):
    wrap: Annotated[Literal["auto"] | SizeMatch | list[Match], Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = "auto"
    """Blocks that are sharded each by itself, by name ("layer?.*"), class ({type: EncoderLayer}) or size ({min_params:
    1000000}); a rank holds one of them whole at a time. What is in none is a block of its own, whole while a step runs.
    auto: the outermost modules that occur several times by class, such as a transformer's layers."""
    reshard_after_forward: Annotated[bool, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = True
    """Let go of a block's parameters after its forward, and gather them again for its backward. false: a block stays
    whole from forward to backward, which saves a gathering and needs a whole model's memory in a step."""


class DebugConfig(Settings):
    ledger: bool = False
    """Write the ids of the samples that each rank consumed at each step."""
    fast_dev_run: bool = False
    """Two batches of every stage, in a run directory of its own. The agreement that `convert` asks for is at most 0.9,
    as nothing is learned in two batches."""
    collectives: Annotated[bool, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = False
    """Check at each collective that all ranks call the same one, as TORCH_DISTRIBUTED_DEBUG=DETAIL does; slow."""


class Config(Settings):
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    strategy: Annotated[
        str, Registered(registry.strategies, ("auto",)), Field(json_schema_extra=MAY_CHANGE_ON_RESUME)
    ] = "auto"
    """auto: single for one process, ddp for several. dp: nn.DataParallel over the visible GPUs of one process. fsdp:
    the parameters, gradients and optimizer states of a stage's training in shards over the ranks, by torch's FSDP2.
    accelerate: as set by `accelerate config`, with FSDP2 in it as fsdp. ft: replicas of one process each, which come
    and go without a restart, by torchft."""
    fsdp: FSDPConfig = FSDPConfig()
    """For `strategy: fsdp`."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """bf16, fp16: autocast of forward and loss; parameters stay FP32, and fp16 scales the loss. auto: bf16 if the
    device computes in it, else fp16 on GPUs and fp32 on CPUs; chosen at the first start. With `strategy: accelerate`,
    accelerate's mixed_precision replaces fp32 and auto."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile the model in train and qat. auto: in each stage where it saves more time than it takes, if a
    compiler is there and the model compiles. That is estimated from model, batch, steps and threads, at the first
    start. Compiled and uncompiled results differ in the last bits: give true or false for equal ones everywhere."""
    sync_batchnorm: bool = False
    """Synchronise BatchNorm over all ranks in `train`, at the cost of two more collectives for each layer and
    micro-batch. qat works with plain BatchNorm."""
    find_unused_parameters: Annotated[bool | Literal["auto"], Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = "auto"
    """Look in every step for parameters without a gradient, as of layers that are dropped at random, at the cost of one
    more collective. auto: where set-up finds such parameters; some that are rarely left out can be missed there. false:
    never; where set-up finds some, several ranks refuse to train."""
    stages: Annotated[list[Annotated[str, Registered(registry.stages)]], Field(min_length=1)] = [
        "train",
        "ptq",
        "qat",
        "convert",
        "export",
    ]
    """Names of stages, in order; the section of a stage's name holds its settings."""
    train: TrainConfig = TrainConfig()
    half: HalfConfig = HalfConfig()
    ptq: PTQConfig = PTQConfig()
    qat: QATConfig = QATConfig()
    convert: ConvertConfig = ConvertConfig()
    export: ExportConfig = ExportConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    stop: StopConfig = StopConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    log: LogConfig = LogConfig()
    profile: Annotated[ProfileConfig | None, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = None
    """Record a trace of some steps."""
    wandb: WandbConfig = WandbConfig()
    debug: DebugConfig = DebugConfig()
    trackers: Annotated[
        list[Annotated[str, Registered(registry.trackers)]], Field(json_schema_extra=MAY_CHANGE_ON_RESUME)
    ] = ["jsonl"]

    @property
    def quantizes(self) -> bool:
        """True where a stage needs the quantization backend."""
        return bool({"ptq", "qat", "convert"} & set(self.stages))

    @property
    def store(self) -> str | None:
        """The run directory's address at an object store; None where it is a folder."""
        if not isinstance(self.run.dir, str):
            return None
        return self.run.dir + ("-fast-dev-run" if self.debug.fast_dev_run else "")

    @property
    def run_dir(self) -> Path:
        """The run directory on this machine; a fast development run has its own. That of an address is its copy."""
        if self.store is not None:
            return local_copy(self.store, self.run.spool)
        base = Path(self.run.dir or Path("runs") / self.run.name)
        if not self.debug.fast_dev_run:
            return base
        named = base if base.name not in ("", "..") else base.resolve()  # "." has no name
        return named.with_name(named.name + "-fast-dev-run")


def config_model(stages: list[str]) -> type[Config]:
    """Returns Config with a section for each third-party stage in `stages` that registered settings."""
    sections: dict[str, Any] = {}
    for name in stages:
        if name not in Config.model_fields and name in registry.stages:
            settings = registry.stages.settings(name)
            if settings is not None:
                required = any(info.is_required() for info in settings.model_fields.values())
                sections[name] = (settings, ... if required else Field(default_factory=settings))
    return create_model("Config", __base__=Config, **sections) if sections else Config


def leaves(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Yields each setting as (dotted key, JSON value, True if it determines the result), in the tree's order."""
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
