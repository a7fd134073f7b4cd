"""Loading of one of an artifact's models, after its hashes were checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_train import trees
from dist_train.addresses import is_address
from dist_train.artifact.fetch import fetch_artifact
from dist_train.artifact.store import MANIFEST, find_artifact, read_artifact
from dist_train.errors import ArtifactError, DataError
from dist_train.programs.operators import trust_operators
from dist_train.programs.program import Call, Program, open_program
from dist_train.programs.signature import tree_of
from dist_train.trees import Tree

HALF = ("bf16", "fp16")
POSTPROCESS = "postprocess"
"""Field of a manifest whose models' outputs are made boxes; its files by format."""


def load_artifact(
    path: Path | str,
    model: str | None = None,
    *,
    operators: Mapping[str, str] | None = None,
    postprocess: bool | None = None,
) -> tuple[Call, dict[str, Any]]:
    """Verifies all hashes, then loads a model. Only for artifacts from a source you trust; see `artifact.store`.

    Args:
        path: an export directory, a run directory with one, or a model's file in it; or the address of a directory at
            an object store.
        model: one of the manifest's `models`, as int8, fp32, bf16, fp16; half is bf16 or fp16. None: the file that
            `path` names, else the manifest's `default`.
        operators: operators of other libraries that you trust, which programs may hold from then on, each with the
            module that registers it, as `export.operators`.
        postprocess: make boxes of a detector's outputs; None: as the artifact was exported (`export.postprocess`).

    Returns:
        The model as a function, and the manifest. The function takes float32 [B, C, H, W] on the CPU, normalized with
        the manifest's `normalization`; where the manifest's `input` has dtype uint8 (`export.input: uint8`), it takes
        uint8 images, and normalizes them itself. A model of several inputs takes the tree that the manifest's `inputs`
        list: a dict, or a tuple where the names are positions. The function returns float32, for a classification
        logits [B, classes], or the tree of `outputs`; it raises DataError for another shape or dtype. A pt2 int8 model
        simulates int8 in float32 (quantize and dequantize): right, but not fast. For speed lower it
        (`dist_train.lowering.lower`), or write another format (`dist-train export`). With `postprocess` it returns a
        list with a dict for each image, as torchvision's detectors do, the most certain box first: `boxes`, float32
        [D, 4] as x1, y1, x2, y2 in pixels of the input, `scores` [D], and `labels`, int64 [D], indices of `classes`.

    Raises:
        ArtifactError: as `verify_artifact` and `open_program`; also for a model that the artifact does not hold.
    """
    trust_operators(operators or {})
    path = fetch_artifact(path) if isinstance(path, str) and is_address(path) else Path(path)
    manifest, files = read_artifact(find_artifact(path))
    if model is None and path.suffix:
        model = next((name for name, entry in manifest["models"].items() if entry["file"] == path.name), None)
        if model is None and path.is_file() and path.name != MANIFEST:
            known = ", ".join(entry["file"] for entry in manifest["models"].values())
            raise ArtifactError(f"{path} is not a program that {MANIFEST} lists", f"one of: {known}")
    entry = manifest["models"][choose_model(manifest, model)]
    program = Program(entry["kind"], files[entry["file"]], {name: files[name] for name in entry.get("extra", [])})
    call = open_program(program)
    finish = _boxes(manifest) if (POSTPROCESS in manifest if postprocess is None else postprocess) else None
    expected = manifest.get("inputs") or [{"name": "", **manifest["input"]}]

    def answer(*args: Any, **kwargs: Any) -> Tree:
        inputs = args[0] if len(args) == 1 and not kwargs else kwargs or args
        require_leaves(inputs, expected)
        with torch.no_grad():
            outputs = call(inputs)
        return outputs if finish is None else finish(outputs)

    return answer, manifest


def _boxes(manifest: Mapping[str, Any]) -> Callable[[Tree], list[dict[str, Tensor]]]:
    """Returns the function from a detector's dense outputs to the boxes of each image.

    Raises:
        ArtifactError: the artifact is no detector's.
    """
    if "detector" not in manifest:
        raise ArtifactError(f"the artifact is of the task {manifest['task']}, not a detector's", "postprocess=False")
    from dist_train.tasks.detector import Detector, detections  # torchvision, which other artifacts do not need

    detector = Detector.of_json(manifest["detector"])
    return lambda outputs: [
        {"boxes": found.boxes, "scores": found.scores, "labels": found.classes}
        for found in detections(outputs, detector)
    ]


def require_leaves(inputs: Tree, expected: Sequence[Mapping[str, Any]]) -> None:
    """Checks inputs against the manifest's `inputs`.

    Raises:
        DataError: a leaf is missing or unknown, is no tensor, or has another dtype or shape; names it.
    """
    given, known = dict(trees.named_leaves(inputs)), [leaf["name"] for leaf in expected]
    if given.keys() != set(known):
        missing = [name for name in known if name not in given]
        unknown = [name for name in given if name not in known]
        parts = [f"lacks {', '.join(missing)}"] if missing else []
        parts += [f"has {', '.join(unknown)}"] if unknown else []
        one_tensor = known == [""] or "" in given
        what = f"is a {type(inputs).__name__}" if one_tensor else " and ".join(parts)
        raise DataError(f"the model takes {_in_words(expected)}, and the input {what}", _example_of(known))
    batches = {name: len(leaf) for name, leaf in given.items() if isinstance(leaf, torch.Tensor) and leaf.dim()}
    for leaf in expected:
        name, tensor = leaf["name"], given[leaf["name"]]
        what = f"{name} of the input" if name else "the input"
        if not isinstance(tensor, torch.Tensor):
            raise DataError(f"{what} is a {type(tensor).__name__}, not a tensor", "torch.as_tensor(...)")
        found, shape = str(tensor.dtype).removeprefix("torch."), list(tensor.shape)
        fits = len(shape) == len(leaf["shape"]) and all(
            size in (None, own) for size, own in zip(leaf["shape"], shape, strict=True)
        )
        if found != leaf["dtype"] or not fits:
            hint = "convert and normalize the images as `input` and `normalization` of the manifest say"
            if leaf["dtype"] == "uint8" and not name:
                hint = "give the pixels as they are: normalization is inside the model"
            elif name or not leaf["dtype"].startswith("float"):
                hint = "give what `inputs` of the manifest lists, with any batch size"
            raise DataError(f"the model takes {_leaf_in_words(leaf)}, but got torch.{found} {shape}", hint)
    if len(set(batches.values())) > 1:
        sizes = ", ".join(f"{each} {size}" for each, size in batches.items())
        raise DataError(f"the leaves of the input have unlike numbers of rows: {sizes}", "give one batch")


def _leaf_in_words(leaf: Mapping[str, Any]) -> str:
    """`mask: int64 [batch, any]`."""
    sizes = ["batch", *("any" if size is None else str(size) for size in leaf["shape"][1:])]
    return f"{leaf['name']}: {leaf['dtype']} [{', '.join(sizes)}]".removeprefix(": ")


def _in_words(leaves: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(map(_leaf_in_words, leaves))


def _example_of(names: Sequence[str]) -> str:
    """Returns what to type for inputs of these names."""
    inputs = tree_of(names, ["tensor"] * len(names))
    return f"call it with {inputs!r}".replace("'tensor'", "tensor")


def choose_model(manifest: Mapping[str, Any], wanted: str | None) -> str:
    """Returns a model's name in the manifest's `models`: None is the default, half is bf16 or fp16.

    Raises:
        ArtifactError: the artifact does not hold it.
    """
    models: Mapping[str, Any] = manifest["models"]
    default: str = manifest["default"]
    if wanted is None:
        return default
    found = next((name for name in (HALF if wanted == "half" else (wanted,)) if name in models), None)
    if found is None:
        raise ArtifactError(
            f"the artifact holds no model {wanted!r}",
            f"one of: {', '.join(models)}; or add it: dist-train export RUN_DIR --model {wanted}",
        )
    return found
