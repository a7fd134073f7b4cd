"""The verbs about what a run made: evaluate, export, predict. Starts without importing torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from dist_train.cli.verbs import Typed, Verb, import_user_modules, known_run_dir, one_of, positionals, typed
from dist_train.errors import EXIT_DONE, EXIT_FAILED, UsageError

_EVALUATE = "RUN_DIR [--model M] [--data.KEY VALUE ...] [--json]"
_EXPORT = "RUN_DIR [--format F] [--model M]"
_PREDICT = "ARTIFACT IMAGE... [--model M] [--format csv|json] [--top K]"


def _evaluate(arguments: list[str]) -> int:
    given = typed("evaluate", _EVALUATE, arguments, ("model", "import"), ("json",), section="data")
    run_dir = _only_run_dir("evaluate", _EVALUATE, given)
    import_user_modules(list(given.options.get("import", [])))
    from dist_train.finished_run.evaluate import evaluate_run

    evaluate_run(run_dir, given.last("model"), given.settings, as_json="json" in given.options)
    return EXIT_DONE


def _export(arguments: list[str]) -> int:
    given = typed("export", _EXPORT, arguments, ("format", "model", "import"))
    run_dir = _only_run_dir("export", _EXPORT, given)
    from dist_train.registry import export_formats

    formats = [
        one_of("format", name, ["auto", "pt2", *export_formats.names()])
        for name in given.options.get("format", ["pt2"])
    ]
    model = given.last("model")
    if model is not None:
        one_of("model", model, ("fp32", "half", "bf16", "fp16", "int8"))
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("export is for one process", f"type dist-train export {run_dir}, without torchrun")
    import_user_modules(list(given.options.get("import", [])))
    from dist_train.finished_run.export import export_run

    for line in export_run(run_dir, formats, model):
        print(line)
    print(run_dir / "export")
    return EXIT_DONE


def _predict(arguments: list[str]) -> int:
    given = typed("predict", _PREDICT, arguments, ("model", "format", "top"))
    artifact, *images = positionals("predict", _PREDICT, given.words, 2, sys.maxsize)
    format = one_of("format", given.last("format") or "csv", ("csv", "json"))
    top = given.last("top") or "1"
    if not top.isascii() or not top.isdecimal() or int(top) < 1:
        raise UsageError(f"--top must be a whole number, at least 1, not {top}", "type --top 5")
    from dist_train.artifact.store import find_artifact, verify_artifact
    from dist_train.finished_run.predict import image_files, predict, require_format, shown

    manifest = verify_artifact(find_artifact(Path(artifact)))
    require_format(manifest, format)
    files = image_files(images)
    code = EXIT_DONE
    lines = 0
    print("[" if format == "json" else "file,class,probability")
    for prediction in predict(artifact, files, given.last("model")):
        if prediction.outputs is None:
            print(f"dist-train: {prediction.error}", file=sys.stderr)
            code = EXIT_FAILED
        else:
            separator = "" if format == "csv" or lines == 0 else ",\n"
            print(separator + shown(prediction, manifest, format, int(top)), end="\n" if format == "csv" else "")
            lines += 1
    if format == "json":
        print("\n]")
    return code


def _only_run_dir(verb: str, usage: str, given: Typed) -> Path:
    return known_run_dir(verb, positionals(verb, usage, given.words, 1, 1))


ARTIFACT_VERBS = (
    Verb(
        "evaluate",
        _EVALUATE,
        "evaluate the models of a run again",
        _evaluate,
        """\
RUN_DIR is the directory of a run, with its config.yaml.
  --model MODEL          fp32, half, int8, or the path of an artifact; default: all that the run has
  --data.KEY VALUE       other data, as in a configuration: --data.name digits; normalised as the training data was
  --json                 print JSON instead of a table
  --import MODULE        import a module first that registers what the run used
On several ranks: torchrun --nproc_per_node N -m dist_train evaluate RUN_DIR""",
    ),
    Verb(
        "export",
        _EXPORT,
        "write a model of a finished run in another format",
        _export,
        """\
Files go to RUN_DIR/export, beside those that are there; the artifact is replaced whole or not at all.
Neither the data nor the device of the run is needed. What is written is read back in its runtime, and held against the model.
  --format FORMAT        pt2 (the default), onnx, openvino, executorch; repeatable. auto: each that is installed is timed,
                         FP32 beside it, and the fastest that answers right is written; the table goes into results.json
  --model MODEL          fp32, half, int8; default: the artifact's own, or the first of int8, half, fp32
  --import MODULE        import a module first that registers the run's model""",
    ),
    Verb(
        "predict",
        _PREDICT,
        "what an exported model says of image files",
        _predict,
        """\
ARTIFACT is an export directory, or a run directory with one. IMAGE is a file, a folder, or a pattern in quotes.
  --model MODEL          one of the artifact's models; default: its own
  --format FORMAT        csv (the default): file,class,probability; json: an array of objects
  --top K                the K likeliest classes of each image
An image that cannot be read is named; the others are predicted, and the exit code is 1.""",
    ),
)
