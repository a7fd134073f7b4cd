"""Checks of `strategy` and `precision` against other settings and the variables of `accelerate launch`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from dist_train.cluster.mpi import mpi_names
from dist_train.cluster.rank_plan import source_of
from dist_train.cluster.replicas import LIGHTHOUSE, NUMBER, NUMBERS, replica_number
from dist_train.config.checks.accelerate_fsdp import accelerate_fsdp_problems, as_launched
from dist_train.config.tree import Config
from dist_train.errors import Problem

Precision = Literal["fp32", "bf16", "fp16"]

# accelerate's `mixed_precision` -> our `precision`. fp8 is left out, as no strategy computes in it.
_PRECISIONS: dict[str, Precision] = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
_SHARDED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


def accelerate_precision(environ: Mapping[str, str]) -> Precision | None:
    """Returns `mixed_precision` of the accelerate config that this process was launched with, or None."""
    return _PRECISIONS.get(environ.get("ACCELERATE_MIXED_PRECISION", "").lower())


def strategy_problems(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    """Yields contradictions of `strategy` with `precision`, `compile`, the ranks, and accelerate's variables."""
    name = _size_name(environ)
    ranks = environ.get(name, "1")
    several = ranks.isdecimal() and int(ranks) > 1
    if config.strategy == "single" and several:
        message = f"'single' is for one process, but this is one of {ranks} ({name})"
        yield Problem("strategy", message, hint="--strategy auto, or start one process: dist-train run CONFIG")
    if config.strategy == "dp":
        if several:
            message = f"'dp' drives all GPUs from one process, but this is one of {ranks} ({name})"
            yield Problem("strategy", message, hint="--strategy ddp, or start one process: dist-train run CONFIG")
        if config.compile is True:
            message = "'dp' copies the model to the GPUs at each step, which torch.compile cannot follow"
            yield Problem("strategy", message, hint="--compile false, or a rank for each GPU with --strategy ddp")
    if config.strategy == "accelerate":
        yield from _accelerate_problems(config, environ)
    if as_launched(config, environ).strategy == "fsdp":
        yield from _fsdp_problems(config)
    if config.strategy == "ft":
        yield from _ft_problems(config)
        yield from _replica_problems(environ, f"{ranks} ({name})" if several else "")


def _fsdp_problems(config: Config) -> Iterator[Problem]:
    """Yields what a model in shards cannot be trained with."""
    if config.compile is True:
        message = "fsdp gathers each block's parameters as the model runs, which breaks what torch.compile compiles"
        yield Problem("compile", message, hint="--compile false, or --strategy ddp")
    if config.sync_batchnorm:
        message = "replaces batch norms as training begins, which fsdp cannot undo in shards"
        yield Problem("sync_batchnorm", message, hint="--sync_batchnorm false, or --strategy ddp")
    if config.find_unused_parameters is True:
        message = "looks for parameters that steps leave out, whose gradients would be 0 in shards instead of none"
        yield Problem("find_unused_parameters", message, hint="--find_unused_parameters auto, or --strategy ddp")


def _ft_problems(config: Config) -> Iterator[Problem]:
    """Yields what replicas that come and go cannot do."""
    if "qat" in config.stages or "train" not in config.stages:
        message = "'ft' trains in the stage 'train' alone"
        hint = "--stages '[train]'; then qat in a run of its own, with --model.init_from RUN_DIR/replica-0"
        yield Problem("stages", message, hint=hint)
    if config.compile is True:
        message = "'ft' gives a replica other shares as others come and go, each of which would be compiled"
        yield Problem("compile", message, hint="--compile false, or --strategy ddp")
    if config.sync_batchnorm:
        message = "needs ranks that stay together within a step, and under 'ft' one may be gone"
        yield Problem("sync_batchnorm", message, hint="--sync_batchnorm false, or --strategy ddp")
    if config.train.select == "best":
        message = "'best' needs the checkpoints of all epochs, and a replica that came late has not those before"
        yield Problem("train.select", message, hint="--train.select last, or --strategy ddp")
    if config.train.early_stopping is not None or config.train.schedule.name == "ReduceLROnPlateau":
        place = "train.early_stopping" if config.train.early_stopping is not None else "train.schedule.name"
        message = "follows evaluations, and under 'ft' each replica makes its own, which may differ in the last bits"
        yield Problem(place, message, hint="remove it, or --strategy ddp")
    if config.store is not None:
        message = f"is an address, {config.store}, and replicas under 'ft' have a folder each"
        yield Problem("run.dir", message, hint="--run.dir FOLDER")


def _replica_problems(environ: Mapping[str, str], several: str) -> Iterator[Problem]:
    """Yields what the environment of a replica lacks. several: the number of ranks and its variable, if not one."""
    if several:
        message = f"under 'ft' a replica is one process, but this is one of {several}"
        hint = f"start each by itself: {NUMBER}=0 dist-train run CONFIG, {NUMBER}=1 ..."
        yield Problem("strategy", message, hint=hint)
    if not environ.get(LIGHTHOUSE):
        message = f"'ft' meets the other replicas at torchft's lighthouse, and {LIGHTHOUSE} is not set"
        hint = f"torchft_lighthouse --min_replicas 1, on one machine; then {LIGHTHOUSE}=http://HOST:29510 here"
        yield Problem("strategy", message, f"environment: {LIGHTHOUSE}", hint, here=True)
    elif not environ[LIGHTHOUSE].startswith(("http://", "https://")):
        message = f"{LIGHTHOUSE} is {environ[LIGHTHOUSE]!r}, which does not begin with http://"
        hint = f"{LIGHTHOUSE}=http://HOST:29510"
        yield Problem("strategy", message, f"environment: {LIGHTHOUSE}", hint, here=True)
    for name in NUMBERS:
        text = environ.get(name, "1")
        if not (text.isascii() and text.isdecimal() and int(text)):
            message = f"torchft reads a whole number, 1 or more, from {name}, which is {text!r}"
            yield Problem("strategy", message, f"environment: {name}", f"{name}=60, or leave it out", here=True)
    if replica_number(environ) is None:
        given = environ.get(NUMBER)
        message = f"'ft' needs this replica's number in {NUMBER}, which is {repr(given) if given else 'not set'}"
        hint = f"{NUMBER}=0 dist-train run CONFIG, and {NUMBER}=1 for the next"
        yield Problem("strategy", message, f"environment: {NUMBER}", hint, here=True)


def _size_name(environ: Mapping[str, str]) -> str:
    """Returns the name of the launcher's variable that holds the number of ranks."""
    mpi = mpi_names(environ)
    names = {"torchrun": "WORLD_SIZE", "slurm": "SLURM_STEP_NUM_TASKS", "mpi": mpi.world_size if mpi else ""}
    return names.get(source_of(environ), "")


def _accelerate_problems(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    for name, what in _SHARDED.items():
        if environ.get(name, "").lower() == "true":
            message = f"the accelerate config asks for {what}, which strategy accelerate does not train with"
            hint = "choose multi-GPU (DDP) or FSDP2 in `accelerate config`, or accelerate launch --multi_gpu ..."
            yield Problem("strategy", message, f"environment: {name}", hint)
    yield from accelerate_fsdp_problems(config, environ)
    backend = environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        message = (
            f"the accelerate config compiles by torch dynamo ({backend}), with shapes that a resumed run may not repeat"
        )
        hint = "leave dynamo_config out of it, and give --compile true"
        yield Problem("strategy", message, "environment: ACCELERATE_DYNAMO_BACKEND", hint)
    steps = environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        message = f"the accelerate config accumulates {steps} steps; here that follows from the batch sizes"
        hint = "gradient_accumulation_steps: 1 there, and --data.micro_batch_size N here"
        yield Problem("strategy", message, "environment: ACCELERATE_GRADIENT_ACCUMULATION_STEPS", hint)
    if config.run.device == "cuda" and environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        message = "is cuda, and the accelerate config says use_cpu: true"
        yield Problem("run.device", message, hint="--run.device auto, or use_cpu: false there")
    given = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    theirs = accelerate_precision(environ)
    if given.lower() not in _PRECISIONS:
        message = f"the accelerate config says mixed_precision: {given}, which is not supported"
        hint = "accelerate launch --mixed_precision bf16 (or fp16, or no)"
        yield Problem("precision", message, "environment: ACCELERATE_MIXED_PRECISION", hint)
    elif theirs is not None and config.precision not in ("auto", "fp32", theirs):
        message = f"is {config.precision}, and the accelerate config says mixed_precision: {given}"
        hint = f"accelerate launch --mixed_precision {config.precision} ..., or leave precision out here"
        yield Problem("precision", message, hint=hint)
