"""Finds the checkpoint to resume from where the newest is damaged, and rebuilds the run's other files from it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from dist_train.config.load import dump
from dist_train.config.tree import Config
from dist_train.distributed.world import World
from dist_train.run_dir.checkpoint import CheckpointFolder, none_is_whole
from dist_train.run_dir.files import replace_text
from dist_train.run_dir.paths import RunDir
from dist_train.run_dir.record import copy_in_checkpoints
from dist_train.run_dir.saved import ASIDE, Moment, pointed
from dist_train.run_dir.status import steps_of

Say = Callable[[str], None]


def agree_on_checkpoint(run_dir: RunDir, stages: Sequence[str], world: World, say: Say) -> str | None:
    """Makes `latest` the newest checkpoint that verifies on all ranks, with all that it needs. Collective.

    Damaged ones are renamed, kept and named, with the steps that are done again. Each rank reads the files itself:
    another node's cache, or its way to them, may give other bytes. Files of shards are read by one rank each, and again
    by those that need them.

    Returns:
        the checkpoint's name; None in a new run.

    Raises:
        CheckpointError: on all ranks, where none verifies; nothing is changed then.
    """
    folder = CheckpointFolder(run_dir.checkpoints)
    first = world.on_rank_0(lambda: folder.latest, "finding the newest checkpoint")
    if first is None:
        return None
    damage: dict[str, str] = {}
    chosen = first
    if not _whole(folder, first, world, damage):
        for chosen in world.on_rank_0(lambda: folder.newest_first()[1:], "finding older checkpoints"):
            if _whole(folder, chosen, world, damage):
                break
        else:
            raise none_is_whole(run_dir.checkpoints, damage)

    def repair() -> None:
        named, problem = pointed(run_dir.checkpoints)
        if named is None:
            say(f"{problem or f'{run_dir.checkpoints} has no latest.json'}; the newest checkpoint in it was looked for")
        for name, text in damage.items():
            aside = folder.set_aside(name)
            say(text + (f"; it is kept as {aside}" if aside is not None else ""))
        if named != chosen:
            folder.point_to(chosen)
        if damage:
            lost = max((first, *damage), key=lambda name: _order(name, stages))
            say(f"going on from the checkpoint {chosen}: {_done_again(run_dir, lost, chosen, stages)}")

    world.on_rank_0(repair, "setting damaged checkpoints aside")
    return chosen


def _whole(folder: CheckpointFolder, name: str, world: World, damage: dict[str, str]) -> bool:
    """Tells whether a checkpoint can be used on all ranks; adds what is damaged, and on which ranks. Collective."""
    with world.heartbeat.within("set-up", at_least=world.timeout):
        found = folder.inspect(name, (world.rank, world.world_size))
    answers = world.gather(found)
    for each in {name: None for _, wrong in answers for name in wrong}:
        ranks = [rank for rank, (_, wrong) in enumerate(answers) if each in wrong]
        on = "" if len(ranks) == len(answers) else f" (as rank {', '.join(map(str, ranks))} reads it)"
        damage[each] = answers[ranks[0]][1][each] + on
    return all(usable for usable, _ in answers)


def _order(name: str, stages: Sequence[str]) -> tuple[float, ...]:
    moment = Moment.named(name)
    if moment is None or moment.stage not in stages:
        return (-1.0,)
    return stages.index(moment.stage), float("inf") if moment.step is None else moment.step, not moment.open


def _done_again(run_dir: RunDir, lost: str, chosen: str, stages: Sequence[str]) -> str:
    """Says which steps lie between two checkpoints."""
    if _order(lost, stages) <= _order(chosen, stages):
        return "no step is done again"
    before, after = Moment.named(chosen), Moment.named(lost)
    if before is None or after is None or before.stage not in stages:
        return "the steps since then are done again"
    parts = []
    for stage in stages[stages.index(before.stage) : stages.index(after.stage) + 1]:
        begun = before.step if stage == before.stage else 0
        if begun is None:
            continue  # the checkpoint is its end
        ended = after.step if stage == after.stage else None
        if ended is None:
            ended = steps_of(run_dir, stage)
        if ended is not None:
            parts += [f"{ended - begun} step{'s' * (ended - begun != 1)} of {stage}"] if ended > begun else []
        else:
            parts.append(f"the rest of {stage}" if begun else stage)
    if not parts:
        return "no step is done again"
    several = len(parts) > 1 or "steps" in parts[0]
    return f"{' and '.join(parts)} {'are' if several else 'is'} done again"


def rebuild_config(run_dir: RunDir, config: Config, say: Say) -> str:
    """Writes config.yaml again where it is lost or is not what the checkpoints say; returns its text. Rank 0 only.

    A former file is kept beside it.
    """
    try:
        found: str | None = run_dir.config.read_text(encoding="utf-8")
    except (OSError, ValueError):
        found = None
    text: str | None = copy_in_checkpoints(run_dir).get("config")
    if text is None:  # checkpoints of an older version
        if found is not None:
            return found
        say(f"{run_dir.config} is lost, and the checkpoints hold no copy: the settings cannot be compared with it")
        text = dump(config)
    if found != text:
        aside = run_dir.config.with_name(f"{ASIDE}{run_dir.config.name}")
        there = run_dir.config.exists()
        if there:
            os.replace(run_dir.config, aside)
        replace_text(run_dir.config, text)
        kept = f"is not what the run began with; it is kept as {aside.name}" if there else "was lost"
        say(f"{run_dir.config} {kept}, and is written again from the checkpoint")
    return text


def record(config_text: str, environment: dict[str, Any], attempt: int) -> dict[str, Any]:
    """Returns what each checkpoint holds so that the run's other files can be rebuilt."""
    return {"config": config_text, "environment": environment, "attempt": attempt}
