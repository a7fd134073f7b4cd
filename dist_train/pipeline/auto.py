"""Resolves `auto` for this machine: strategy, precision, device, threads, workers, qat.engine, with the reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from dist_train.cluster.instructions import sums_overflow
from dist_train.config.checks.accelerate_fsdp import as_launched, asks_for_fsdp, wrapping
from dist_train.config.checks.strategy import Precision, accelerate_precision
from dist_train.config.tree import Config
from dist_train.distributed.devices import visible_gpus
from dist_train.distributed.world import World
from dist_train.errors import SetupError


@dataclass(frozen=True)
class Facts:
    """The ranks' hardware and shares of it.

    Attributes:
        device: "cpu" or "cuda", equal on all ranks.
        cuda_devices: number of CUDA devices that this rank sees.
        cores: number of CPU cores that this node's ranks share.
        threads: CPU threads of each rank.
        threads_kept: True if `threads` was recorded at the first start of the run.
        workers: data workers of a rank with `data.workers: auto`.
        bf16: the feature for native bfloat16, such as "AVX-512 BF16"; "" if some rank's device lacks one.
        sums_overflow: True if int8 runtimes of some rank's CPU may overflow.
    """

    world_size: int = 1
    local_world_size: int = 1
    device: str = "cpu"
    cuda_devices: int = 0
    cores: int = 1
    threads: int = 1
    threads_kept: bool = False
    workers: int = 1
    bf16: str = ""
    sums_overflow: bool = False


@dataclass(frozen=True)
class Choices:
    """The resolved settings.

    Attributes:
        strategy: registered name.
        engine: `qat.engine`; "auto" where a backend decides by itself.
        lines: progress lines that explain the choices and all other settings that were `auto`.
    """

    strategy: str
    precision: Precision
    engine: str
    lines: tuple[str, ...]


def look(world: World, threads: int, threads_kept: bool) -> Facts:
    """Returns the facts of this world; the fields about the node may differ between nodes. Collective."""
    facts = Facts(
        world_size=world.world_size,
        local_world_size=world.local_world_size,
        device=world.device.type,
        cuda_devices=visible_gpus(),
        cores=world.cores,
        threads=threads,
        threads_kept=threads_kept,
        workers=world.share_of_cores(),
    )
    kinds = world.gather((_native_bf16(facts.device), sums_overflow()))
    native = [bf16 for bf16, _ in kinds]
    return replace(facts, bf16=native[0] if all(native) else "", sums_overflow=any(each for _, each in kinds))


def _native_bf16(device: str) -> str:
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else ""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX-512 BF16" if torch.cpu._is_avx512_bf16_supported() else ""


def choose(
    config: Config,
    facts: Facts,
    environ: Mapping[str, str],
    kept: Precision | None = None,
    kept_engine: str | None = None,
) -> Choices:
    """Resolves strategy, precision and engine.

    Args:
        environ: `os.environ`, with the variables of `accelerate launch`.
        kept: the precision of the interrupted run that this one resumes. Results depend on it, so `auto` keeps it.
        kept_engine: the same of the engine.

    Raises:
        SetupError: the accelerate config has another precision than at the run's first start, or another device.
    """
    said, remarks = [], []
    launched = as_launched(config, environ)
    strategy, why = _strategy(launched.strategy, facts)
    if launched is not config and strategy == "fsdp":
        _require_device(facts, environ)
        why = f"FSDP2 in the accelerate config, with {wrapping(launched)}"
    if config.strategy == "auto":
        said.append(f"strategy {strategy} ({why})")
    elif strategy != config.strategy:
        remarks.append(f"strategy {config.strategy} runs as {strategy}: {why}")
    precision, why = _precision(config, facts, environ, kept)
    if config.precision == "auto":
        said.append(f"precision {precision} ({why})")
    elif precision != config.precision:
        remarks.append(f"precision {precision}: {why}")
    if config.run.device == "auto":
        said.append(f"device {facts.device} ({_device(facts)})")
    if config.run.threads_per_rank == "auto":
        why = "as at the first start" if facts.threads_kept else _shared(facts)
        said.append(f"{_count(facts.threads, 'thread')} per rank ({why})")
    if config.data.workers == "auto":
        said.append(f"at most {_count(facts.workers, 'data worker')} per rank ({_shared(facts)})")
    engine, why = _engine(config, facts, kept_engine)
    if why:
        said.append(f"qat.engine {engine} ({why})")
    theirs = accelerate_precision(environ)
    if config.strategy != "accelerate" and theirs not in (None, "fp32", precision):
        remarks.append(f"accelerate's mixed_precision {theirs} is not used: --strategy accelerate would use it")
    if config.strategy not in ("accelerate", "fsdp") and asks_for_fsdp(environ):
        remarks.append("accelerate's FSDP is not used: --strategy accelerate would use it")
    lines = [f"auto: {', '.join(said)}"] if said else []
    return Choices(strategy, precision, engine, (*lines, *remarks))


def _require_device(facts: Facts, environ: Mapping[str, str]) -> None:
    if facts.device == "cuda" and environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        raise SetupError(
            "the accelerate config says use_cpu: true, and these ranks run on cuda",
            "--run.device cpu, or use_cpu: false in `accelerate config`",
        )


def _strategy(asked: str, facts: Facts) -> tuple[str, str]:
    if asked == "dp" and (facts.device != "cuda" or facts.cuda_devices < 2):
        seen = "runs on the CPU" if facts.device != "cuda" else f"sees {_count(facts.cuda_devices, 'CUDA device')}"
        return "single", f"dp needs two CUDA devices, and this process {seen}"
    if asked == "fsdp" and facts.world_size == 1:
        return "single", _ranks(1)
    if asked in ("auto", "ddp"):
        return ("ddp" if facts.world_size > 1 else "single"), _ranks(facts.world_size)
    return asked, ""


def _precision(
    config: Config, facts: Facts, environ: Mapping[str, str], kept: Precision | None
) -> tuple[Precision, str]:
    if config.strategy == "accelerate":
        theirs = accelerate_precision(environ)
        if theirs is not None:
            if kept is not None and theirs != kept:
                raise SetupError(
                    f"this run began in {kept}, but the accelerate config now says {theirs}",
                    f"accelerate launch --mixed_precision {'no' if kept == 'fp32' else kept} ..., or another --run.dir",
                )
            return theirs, "accelerate's mixed_precision"
        if kept is not None:
            return kept, "as at the first start"
    if config.precision != "auto":
        return config.precision, ""
    if kept is not None:
        return kept, "as at the first start"
    this = "this GPU" if facts.device == "cuda" else "this CPU"
    if facts.bf16:
        return "bf16", f"{this} has {facts.bf16}"
    if facts.device == "cuda":
        return "fp16", f"{this} has no bfloat16"
    return "fp32", f"{this} would emulate bf16 and fp16"


def _engine(config: Config, facts: Facts, kept: str | None) -> tuple[str, str]:
    asked = config.qat.engine
    # What nobody converts runs in no runtime, and other backends have the engine of the machine's architecture.
    if asked != "auto" or config.qat.backend != "pt2e" or "convert" not in config.stages:
        return asked, ""
    if kept is not None:
        return kept, "" if kept == "auto" else "as at the first start"
    return ("x86", "a CPU without VNNI: 127 steps keep sums in 16 bits") if facts.sums_overflow else (asked, "")


def _device(facts: Facts) -> str:
    if facts.device == "cuda":
        return f"{_count(facts.cuda_devices, 'CUDA device')} for {_ranks(facts.local_world_size)}"
    if facts.cuda_devices == 0:
        return "no CUDA"
    return f"only {_count(facts.cuda_devices, 'CUDA device')} for {_ranks(facts.local_world_size)}"


def _shared(facts: Facts) -> str:
    return f"{_count(facts.cores, 'core')}, {_ranks(facts.local_world_size)}"


def _ranks(count: int) -> str:
    return _count(count, "rank")


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
