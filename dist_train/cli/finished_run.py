"""The verbs about what a run made: evaluate, export, predict. Starts without importing torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from dist_train.cli.verbs import (
    DIRECTORY,
    DottedVerb,
    OneOf,
    Verb,
    Whole,
    import_user_modules,
    imports,
    option,
    run_dirs,
)
from dist_train.errors import EXIT_DONE, EXIT_FAILED, UsageError

_RUN_DIR = click.argument("run_dir", metavar="RUN_DIR", type=DIRECTORY, callback=run_dirs)


class _Evaluate(DottedVerb):
    section = "data"


@click.command(cls=_Evaluate)
@_RUN_DIR
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
@_RUN_DIR
@option("--format", "FORMAT", _FORMAT, field="formats", type=OneOf(_formats), multiple=True, default=["pt2"])
@option("--model", "MODEL", _EXPORTED, type=OneOf(lambda: ("fp32", "half", "bf16", "fp16", "int8")))
@imports
def export(run_dir: Path, formats: tuple[str, ...], model: str | None, modules: tuple[str, ...]) -> int:
    """Writes a model of a finished run in another format.

    Files go to RUN_DIR/export, beside the files that are there; the artifact is replaced whole or not at all. Needs
    neither the data nor the device of the run. What is written is read back in its runtime, and compared with the
    model.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("export is for one process", f"type dist-train export {run_dir}, without torchrun")
    import_user_modules(modules)
    from dist_train.finished_run.export import export_run

    for line in export_run(run_dir, list(formats), model):
        print(line)
    print(run_dir / "export")
    return EXIT_DONE


_ROWS = "csv (the default): file,class,probability; json: an array of objects."


@click.command(cls=Verb)
@click.argument("artifact", metavar="ARTIFACT", type=click.Path(path_type=Path))
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True, type=click.Path())
@option("--model", "MODEL", "One of the artifact's models; default: its own.")
@option("--format", "FORMAT", _ROWS, type=OneOf(lambda: ("csv", "json")), default="csv")
@option("--top", "K", "The K likeliest classes of each image; default: 1.", type=Whole(1), default=1)
def predict(artifact: Path, images: tuple[str, ...], model: str | None, format: str, top: int) -> int:
    """Classifies image files with an exported model.

    ARTIFACT is an export directory, or a run directory with one. IMAGE is a file, a folder, or a pattern in quotes.
    An image that cannot be read is named; the others are predicted, and the exit code is 1.
    """
    from dist_train.artifact.store import find_artifact, verify_artifact
    from dist_train.finished_run.predict import image_files, require_format, shown
    from dist_train.finished_run.predict import predict as predictions

    manifest = verify_artifact(find_artifact(artifact))
    require_format(manifest, format)
    files = image_files(list(images))
    code = EXIT_DONE
    lines = 0
    print("[" if format == "json" else "file,class,probability")
    for prediction in predictions(str(artifact), files, model):
        if prediction.outputs is None:
            print(f"dist-train: {prediction.error}", file=sys.stderr)
            code = EXIT_FAILED
        else:
            separator = "" if format == "csv" or lines == 0 else ",\n"
            print(separator + shown(prediction, manifest, format, top), end="\n" if format == "csv" else "")
            lines += 1
    if format == "json":
        print("\n]")
    return code
