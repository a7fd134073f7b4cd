"""The verbs about what a run made: evaluate, export, benchmark, predict. Starts without importing torch."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import click

from dist_train.cli.run_place import DIRECTORY, ArtifactPlace, RunPlace, run_dirs
from dist_train.cli.verbs import (
    DottedVerb,
    Number,
    OneOf,
    Several,
    Verb,
    Whole,
    import_user_modules,
    imports,
    option,
)
from dist_train.errors import EXIT_DONE, EXIT_FAILED, UsageError


def _run_dir(*, changes: bool) -> Any:
    return click.argument("run_dir", metavar="RUN_DIR", type=RunPlace(changes), callback=run_dirs)


class _Evaluate(DottedVerb):
    section = "data"


@click.command(cls=_Evaluate)
@_run_dir(changes=False)
@option(
    "--model",
    "MODEL",
    "fp32, half, int8, or an artifact's path; default: all of the run.",
    type=click.Path(),
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@imports
def evaluate(
    run_dir: Path, model: str | None, as_json: bool, modules: tuple[str, ...], data: list[tuple[str, str]]
) -> int:
    """Evaluates the models of a run again.

    RUN_DIR is the directory of a run, with its config.yaml. --data.KEY VALUE gives other data, as in a configuration:
    --data.name digits; it is normalised as the training data was.

    On several ranks: torchrun --nproc_per_node N -m dist_train evaluate RUN_DIR
    """
    import_user_modules(modules)
    from dist_train.finished_run.evaluate import evaluate_run

    evaluate_run(run_dir, model, [word for setting in data for word in setting], as_json=as_json)
    return EXIT_DONE


_FORMAT = """\
pt2 (the default), onnx, openvino, executorch; repeatable. auto: times each that is installed, with FP32 beside it, and
writes the fastest one that is right; the table goes into results.json."""
_EXPORTED = "fp32, half, int8; default: the artifact's own, or the first of int8, half, fp32."


def _formats() -> list[str]:
    from dist_train.registry import export_formats

    return ["auto", "pt2", *export_formats.names()]


@click.command(cls=Verb)
@_run_dir(changes=True)
@option("--format", "FORMAT", _FORMAT, field="formats", type=OneOf(_formats), multiple=True, default=["pt2"])
@option("--model", "MODEL", _EXPORTED, type=OneOf(lambda: ("fp32", "half", "bf16", "fp16", "int8")))
@imports
def export(run_dir: Path, formats: tuple[str, ...], model: str | None, modules: tuple[str, ...]) -> int:
    """Writes a model of a finished run in another format.

    Files go to RUN_DIR/export, beside the files that are there; the artifact is replaced whole or not at all. Needs
    neither the data nor the device of the run. What is written is read back in its runtime, and compared with the
    model.
    """
    _require_one_process("export", run_dir)
    import_user_modules(modules)
    from dist_train.finished_run.export import export_run

    for line in export_run(run_dir, list(formats), model):
        print(line)
    print(run_dir / "export")
    return EXIT_DONE


def _require_one_process(verb: str, run_dir: Path) -> None:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError(f"{verb} is for one process", f"type dist-train {verb} {run_dir}, without torchrun")


_SIZES = "Batch sizes for latency and throughput; default: 1 32."
_SAMPLES = "Samples of the evaluation set; default: the run's export.agreement_samples."
_SECONDS = "For each measurement of a model in a runtime; default: 0.5."
_MEASURED = "pt2, onnx, openvino, executorch; default: all that are exported or installed."


@click.command(cls=Verb)
@_run_dir(changes=True)
@option("--batch-sizes", "N ...", _SIZES, cls=Several, multiple=True, type=Whole(1, 65_536), default=[1, 32])
@option("--samples", "N", _SAMPLES, type=Whole(1))
@option("--seconds", "S", _SECONDS, type=Number(), default=0.5)
@option("--formats", "FORMAT ...", _MEASURED, cls=Several, multiple=True)
@option("--output", "DIR", "Folder to write to; default: RUN_DIR/benchmark.", type=DIRECTORY)
@click.option("--overwrite", is_flag=True, help="Replace the benchmark that is there.")
@imports
def benchmark(
    run_dir: Path,
    batch_sizes: tuple[int, ...],
    samples: int | None,
    seconds: float,
    formats: tuple[str, ...],
    output: Path | None,
    overwrite: bool,
    modules: tuple[str, ...],
) -> int:
    """Measures the models of a finished run side by side, in every format and runtime.

    Of each model (fp32, half, int8), in each format and each runtime that is installed: bytes, latency, throughput,
    the task's metric, and the share of the samples on which it decides as the model in memory. A runtime that answers
    wrong is not timed. Writes benchmark.json, benchmark.csv and benchmark.png.
    """
    _require_one_process("benchmark", run_dir)
    import_user_modules(modules)
    from dist_train.console.benchmark_table import print_benchmark
    from dist_train.finished_run.benchmark import benchmark_run, check_formats

    check_formats(formats)
    print_benchmark(benchmark_run(run_dir, batch_sizes, samples, seconds, formats, output, overwrite))
    print(output or run_dir / "benchmark")
    return EXIT_DONE


_ROWS = "csv (the default): file,class,probability, of detectors score and box; json: an array of objects."


@click.command(cls=Verb)
@click.argument("artifact", metavar="ARTIFACT", type=ArtifactPlace())
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True, type=click.Path())
@option("--model", "MODEL", "One of the artifact's models; default: its own.")
@option("--format", "FORMAT", _ROWS, type=OneOf(lambda: ("csv", "json")), default="csv")
@option("--top", "K", "The K likeliest classes of each image; default: 1.", type=Whole(1), default=1)
@option("--trust", "OPERATOR=MODULE", "An operator that a program may hold, and what registers it.", multiple=True)
@option("--max-pixels", "N", "Most pixels of an image; default: 100000000.", type=Whole(1, 2**31 - 1))
@option("--draw", "DIR", "Folder for pictures with the boxes of a detector.", field="draw_to", type=DIRECTORY)
def predict(
    artifact: Path,
    images: tuple[str, ...],
    model: str | None,
    format: str,
    top: int,
    trust: tuple[str, ...],
    max_pixels: int | None,
    draw_to: Path | None,
) -> int:
    """Classifies image files with an exported model, or finds their objects with a detector.

    ARTIFACT is an export directory, or a run directory with one. IMAGE is a file, a folder, or a pattern in quotes.
    An image that cannot be read is named; the others are predicted, and the exit code is 1.
    """
    from dist_train.artifact.store import find_artifact, verify_artifact
    from dist_train.data.image_file import MOST_PIXELS
    from dist_train.finished_run.boxes import draw, drawing_folder
    from dist_train.finished_run.predict import header, image_files, require_format, shown
    from dist_train.finished_run.predict import predict as predictions
    from dist_train.programs.operators import trust_operators

    for each in trust:
        if not re.fullmatch(r"\w+::\w+=\w+(\.\w+)*", each):
            raise UsageError(f"--trust takes OPERATOR=MODULE, not {each}", "as torchvision::nms=torchvision")
    trust_operators(dict(each.split("=", 1) for each in trust))
    manifest = verify_artifact(find_artifact(artifact))
    require_format(manifest, format)
    files = image_files(list(images))
    code = EXIT_DONE
    lines = 0
    pictures = None if draw_to is None else drawing_folder(draw_to, manifest)
    print("[" if format == "json" else header(manifest))
    for prediction in predictions(str(artifact), files, model, max_pixels or MOST_PIXELS):
        if prediction.outputs is None:
            print(f"dist-train: {prediction.error}", file=sys.stderr)
            code = EXIT_FAILED
        else:
            separator = "" if format == "csv" or lines == 0 else ",\n"
            text = shown(prediction, manifest, format, top)
            print(separator + text, end="\n" if format == "csv" and text else "")
            lines += 1
            if pictures is not None:
                draw(prediction.file, prediction.outputs, manifest, pictures, max_pixels or MOST_PIXELS)
    if format == "json":
        print("\n]")
    return code
