"""Measures the models of a finished run side by side: each in every format, in every runtime that is installed."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dist_train import __version__, registry
from dist_train.artifact.deployable import Deployable, simulation
from dist_train.artifact.store import read_artifact
from dist_train.distributed.process_group import join
from dist_train.errors import NonFiniteLossError, RunDirError, UsageError, did_you_mean
from dist_train.finished_run.benchmark_rows import Row, rows_of
from dist_train.finished_run.models import deployable, input_of, model_names, trained_model
from dist_train.finished_run.open import FinishedRun, as_trained, reopen
from dist_train.lowering.base import Call, LoweringUnavailable
from dist_train.lowering.comparison import compare_outputs, drawn_from
from dist_train.lowering.latency import compare_spread, compare_throughput
from dist_train.report.benchmark import FILES, benchmark_files
from dist_train.run_dir.files import replace_bytes
from dist_train.stages.context import Context
from dist_train.stages.int8_evaluation import on_cpu
from dist_train.training.evaluate import Evaluation, agreement, evaluate
from dist_train.trees import Tree


def benchmark_run(
    run_dir: Path,
    batch_sizes: Sequence[int] = (1, 32),
    samples: int | None = None,
    seconds: float = 0.5,
    formats: Sequence[str] = (),
    output: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Measures all models of a run; writes benchmark.json, .csv and .png, and returns the content of the first.

    Everything runs on the CPU, in one process, with the threads that a rank of the run had. The formats in `export/`
    are opened as they are; others that are installed are written in memory.

    Args:
        batch_sizes: for latency and throughput.
        samples: of the evaluation set, drawn by the seed; None: `export.agreement_samples`.
        seconds: for each measurement of a row: latency and throughput at each batch size.
        formats: pt2 (the program itself) and export formats; none: all.
        output: the folder; None: `benchmark/` of the run.
        overwrite: True to replace an earlier benchmark there.

    Raises:
        RunDirError: there is no such run, it has no trained model, or the folder holds a benchmark.
        UsageError: a format is unknown.
        DataError: the evaluation set cannot be read.
    """
    run = reopen(run_dir)
    folder = run.paths.benchmark if output is None else output
    _require_room(folder, overwrite)
    wanted = list(dict.fromkeys(formats)) or ["pt2", *registry.export_formats.names()]
    with join(run.config.run) as world:
        context = as_trained(run.session(world, show=True).build(), run.described, whole_shape=True)
        notes = _missing_stages(run)
        rows, figures = _measure(run, context, wanted, list(dict.fromkeys(batch_sizes)), samples, seconds, notes)
    results = {
        "run": run.config.run.name,
        "data": run.config.data.name,
        "batch_sizes": list(dict.fromkeys(batch_sizes)),
        "seconds": seconds,
        "threads": run.threads,
        "cores": os.cpu_count(),
        "date": datetime.date.today().isoformat(),
        "versions": {"dist_train": __version__, "torch": torch.__version__},
        **figures,
        "rows": [row.as_json() for row in rows],
        "notes": notes,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in benchmark_files(results).items():
            replace_bytes(folder / name, content)
    except OSError as error:
        raise RunDirError(f"{folder} cannot be written: {error}", "--output DIR, one that you can write to") from error
    return results


def check_formats(formats: Sequence[str]) -> None:
    """Raises UsageError for an unknown format."""
    known = ["pt2", *registry.export_formats.names()]
    for name in formats:
        if name not in known:
            hint = did_you_mean(name, known, count=1) or f"one of: {', '.join(known)}"
            raise UsageError(f"--formats {name} is unknown", hint)


def _require_room(folder: Path, overwrite: bool) -> None:
    """Refuses a folder with files of these names, or that cannot be written, before anything is measured."""
    first = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not first.is_dir() or not os.access(first, os.W_OK):
        raise RunDirError(f"{folder} cannot be written", "--output DIR, one that you can write to")
    there = next((folder / name for name in FILES if (folder / name).exists()), None)
    if there is not None and not overwrite:
        raise RunDirError(f"{there} is there already", "--overwrite replaces it; or --output DIR, with a new folder")


def _missing_stages(run: FinishedRun) -> list[str]:
    """Returns a note about stages that the run has not finished."""
    missing = [name for name in run.config.stages if name not in run.stages]
    if not missing:
        return []
    known = ", ".join(model_names(run))
    return [f"the run has not finished {', '.join(missing)}: only {known} is there; its command resumes it"]


@torch.no_grad()
def _measure(
    run: FinishedRun,
    context: Context,
    formats: Sequence[str],
    batch_sizes: Sequence[int],
    samples: int | None,
    seconds: float,
    notes: list[str],
) -> tuple[list[Row], dict[str, Any]]:
    """Returns the measured rows, and the task's metric with the number of samples."""
    say, metric = context.progress.say, context.task.headline
    kept, files = read_artifact(run.paths.export) if run.paths.export.is_dir() else ({"models": {}}, {})
    notes += _missing_formats(formats)
    pixels, inputs = input_of(run, kept), context.data.probe_inputs()
    images = drawn_from(inputs if pixels is None else pixels.pixels(inputs), run.config.run.seed)
    float_model, counted = trained_model(run), 0
    rows: list[Row] = []
    for name in model_names(run):
        model, probe = deployable(run, name, float_model, pixels, inputs)
        say(f"benchmark: {name} in {', '.join(formats)}")
        expected = _evaluate(context, model, model.call, samples)
        counted = int(expected.metrics["count"])
        for row in rows_of(model, formats, kept["models"].get(name, {}), files, probe, run.threads):
            rows.append(row)
            if row.opened is not None:
                _judge(row, model, context, expected, samples, images, batch_sizes)
    timed = {f"{place}": row.opened for place, row in enumerate(rows) if row.opened is not None and not row.left_out}
    say(f"benchmark: timing {len(timed)} of {len(rows)} in turns, at batch {', '.join(map(str, batch_sizes))}")
    if timed:
        calls = {place: opened.call for place, opened in timed.items()}
        times = compare_spread(calls, images, batch_sizes, seconds, untimed=1)
        rates = compare_throughput(
            {place: opened.requests for place, opened in timed.items()}, images, batch_sizes, seconds
        )
        for place, opened in timed.items():
            rows[int(place)].latency_ms, rows[int(place)].throughput = times[place], rates[place]
            rows[int(place)].at_once = {str(size): opened.requests.at_once(size) for size in batch_sizes}
    return rows, {"metric": metric, "samples": counted}


def _evaluate(context: Context, model: Deployable, call: Call, samples: int | None) -> Evaluation:
    """Evaluates a call that takes what `model` takes."""
    sample = context.data.evaluation_sample(samples or context.config.export.agreement_samples)
    return evaluate(
        on_cpu(lambda inputs: call(model.takes(inputs)), context.world), sample, context.task, context.world
    )


def _missing_formats(formats: Sequence[str]) -> list[str]:
    """Returns notes about formats of which no file can be written here."""
    lacking = {name: registry.export_formats.entry(name).missing() for name in formats if name != "pt2"}
    return [
        f"{name} is measured only where export/ has it: pip install {' '.join(missing)}"
        for name, missing in lacking.items()
        if missing
    ]


def _judge(
    row: Row,
    model: Deployable,
    context: Context,
    expected: Evaluation,
    samples: int | None,
    images: Any,
    batch_sizes: Sequence[int],
) -> None:
    """Measures score and agreement, and compares outputs at the batch sizes that are timed, also under load.

    `left_out` gets the reason why the row is not to be timed: the speed of wrong outputs is meaningless.
    """
    assert row.opened is not None
    try:
        found = _evaluate(context, model, row.opened.call, samples)
        row.score = float(found.metrics[context.task.headline])
        row.agreement = agreement(found, expected, context.task, context.world)
        if model.simulated_bits:
            row.left_out = f"not timed: {simulation(model.simulated_bits)}"
            return
        compared = compare_outputs(row.opened.call, model, [images(size) for size in batch_sizes])
        row.difference = compared.difference
        wrong = [] if compared.rounding else [f"differently ({compared.difference:.2g} of the largest output)"]
        for size in batch_sizes:
            batches = [images(size) for _ in range(2 * row.opened.requests.at_once(size) + 1)]
            under_load = compare_outputs(_in_turn(row.opened.requests(batches)), model, batches)
            if not under_load.rounding:
                found_there = f"{under_load.difference:.2g} of the largest output"
                wrong.append(f"differently under load, at batch {size} ({found_there})")
        row.left_out = f"not timed: answers {wrong[0]}" if wrong else ""
    except NonFiniteLossError:
        row.left_out = "not timed: some of its answers are not finite"
    except LoweringUnavailable as reason:
        row.left_out = str(reason)


def _in_turn(answers: Sequence[Tree]) -> Call:
    """Returns a call that gives these answers, one after the other."""
    remaining = iter(answers)
    return lambda batch: next(remaining)
