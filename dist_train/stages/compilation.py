"""Decides whether a stage's steps are compiled, equally on all ranks and in all attempts of a run."""

from __future__ import annotations

from torch import nn

from dist_train.config.fit import FitConfig, steps_in
from dist_train.config.stages import QATConfig
from dist_train.data.loader import TrainLoader
from dist_train.errors import SetupError
from dist_train.models.batch_norm import SyncBatchNorm
from dist_train.stages.context import Context
from dist_train.training.compilation import Compilation, Compiled, CompiledFullSteps, Uncompiled, missing_compiler
from dist_train.training.compile_costs import work_of
from dist_train.trees import map_leaves

_SHARDED = "strategy fsdp gathers each block as it runs"


def compilation(
    context: Context, stage: str, settings: FitConfig, model: nn.Module, loader: TrainLoader, total_steps: int
) -> Compilation:
    """Resolves `compile` for a stage; records and says what `auto` is. Collective.

    Raises:
        SetupError: the stage began with compiled steps, and some rank has no compiler now.
    """
    asked, world, progress = context.config.compile, context.world, context.progress
    record = context.results["stages"].setdefault(stage, {})
    if asked != "auto":
        record["compiled"] = asked
        return Compiled() if asked else Uncompiled()
    if context.resume is not None and context.config.strategy not in ("fsdp", "dp", "ft"):
        kept, why = bool(record.get("compiled", False)), "as at the first start"
    else:
        kept, why = None, _against(context, settings, model)
    if kept is None and not why:
        shapes = len(loader.full_passes(map_leaves(lambda leaf: leaf.to("meta"), context.example())))
        why, repaid = _estimate(context, settings, model, total_steps, shapes)
    else:
        repaid = bool(kept)
    missing = world.gather(missing_compiler(world.device.type == "cuda") if repaid else None)
    rank, lacks = next(((rank, each) for rank, each in enumerate(missing) if each is not None), (0, None))
    if lacks is not None and kept:
        raise SetupError(f"{stage} began compiled, and rank {rank} finds {lacks[0]}", lacks[1])
    if lacks is not None:
        repaid, why = False, f"{lacks[0]} on rank {rank}"
    record["compiled"] = repaid
    progress.say(f"auto: {stage} runs {'compiled' if repaid else 'uncompiled'} ({why})")
    if not repaid:
        return Uncompiled()

    def failed(reason: str) -> None:
        record["compiled"] = False
        progress.warn(f"auto: {stage} runs uncompiled: torch.compile fails: {reason}")

    return CompiledFullSteps(loader.full_passes(context.example()), None if kept else failed)


def _against(context: Context, settings: FitConfig, model: nn.Module) -> str:
    """Returns what speaks against compiling, whatever the number of steps; "" if nothing does."""
    if context.data.splits.dynamic:
        return "Splits.dynamic: each length would be compiled"
    if context.config.strategy == "fsdp":
        return _SHARDED
    if context.config.strategy == "ft":
        return "strategy ft changes the shares as replicas come and go"
    if context.config.strategy == "dp":
        return "strategy dp copies the model at each step"
    if settings.activation_checkpointing:
        return "activation_checkpointing: compiled, it would learn otherwise"
    if isinstance(settings, QATConfig) and settings.backend != "pt2e":
        return f"the graph of qat.backend {settings.backend} gains too little"
    if any(isinstance(module, (SyncBatchNorm, nn.SyncBatchNorm)) for module in model.modules()):
        return "sync_batchnorm breaks the graph at each layer"
    return ""


def _estimate(
    context: Context, settings: FitConfig, model: nn.Module, total_steps: int, shapes: int
) -> tuple[str, bool]:
    """Compares what compiling costs without a cache with what the stage's steps save; the same on all ranks."""
    world = context.world
    work = work_of(model, context.example(), context.strategy.autocast)
    rows = -(-context.config.data.global_batch_size // world.world_size)
    costs = work.compile_seconds(shapes * _graphs(settings, total_steps))
    saved = total_steps * work.saved_seconds(rows, world.device.type, context.threads)
    # Ranks may have shares of unlike shapes, so the first one decides.
    repaid, costs, saved = world.gather((saved >= costs, costs, saved))[0]
    return f"an estimated {saved:.0f} s saved in {total_steps:,} steps, {costs:.0f} s to compile", repaid


def _graphs(settings: FitConfig, total_steps: int) -> int:
    """Counts the graphs of a stage: in qat another one from each step on at which something is frozen."""
    if not isinstance(settings, QATConfig):
        return 1
    frozen = {steps_in(each, total_steps) for each in (settings.freeze_batch_norm, settings.freeze_ranges)}
    return 1 + len([step for step in frozen if 0 < step < total_steps])
