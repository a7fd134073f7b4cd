"""Evaluates a finished run again, on any number of ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dist_train.artifact import load_artifact
from dist_train.assembly import configure_torch, make_context
from dist_train.checkpoint import CheckpointFolder
from dist_train.choices import choose, look
from dist_train.config import config_model
from dist_train.errors import RunDirError
from dist_train.evaluate import evaluate
from dist_train.ledger import NoLedger
from dist_train.progress import Progress
from dist_train.run_dir import RunDir, read_json, recorded_config
from dist_train.summary import print_results
from dist_train.trackers.base import Trackers
from dist_train.world import join


def evaluate_run(run_dir: Path) -> dict[str, Any]:
    """Evaluates the float model and the artifact of a run again, on all ranks; writes nothing.

    Raises:
        RunDirError: there is no run, or it has no trained model yet.
    """
    paths = RunDir(Path(run_dir))
    recorded = recorded_config(paths)
    try:
        config = config_model(recorded["stages"]).model_validate(recorded)
    except ValidationError as error:
        raise RunDirError(
            f"{paths.config} does not fit this version or what is registered: {error.errors()[0]['msg']}",
            f"where the run used code of yours: dist-train evaluate {run_dir} --import MODULE",
        ) from error
    folder = CheckpointFolder(paths.checkpoints)
    finished = folder.load(folder.latest)["finished_stages"] if folder.latest is not None else {}
    if not {"train", "export"} & set(finished):
        raise RunDirError(
            f"{run_dir} has no trained model yet", "finish the run first: the same dist-train run command resumes it"
        )
    with join(config.run) as world:
        known = read_json(paths.environment)
        threads = known["threads_per_rank"]
        configure_torch(config, threads)
        choices = choose(config, look(world, threads, threads_kept=True), os.environ, known["precision"])
        context = make_context(
            config,
            paths,
            world,
            threads,
            Progress(world.is_main, config.log.interval),
            Trackers([]),
            NoLedger(),
            choices,
        )
        models = {}
        if "train" in finished:
            context.model.load_state_dict(folder.load(finished["train"])["payload"]["model"])
            models["fp32"] = context.evaluate(context.model).metrics
        if "export" in finished:
            artifact, _ = load_artifact(paths.export)
            models["int8"] = evaluate(
                lambda x: artifact(x.cpu().contiguous()).to(world.device),
                context.evaluation_batches(),
                context.task,
                world,
            ).metrics
        results = {"run": config.run.name, "world_size": world.world_size, "models": models, "gates": {}}
        if world.is_main:
            print_results(results)
    return results
