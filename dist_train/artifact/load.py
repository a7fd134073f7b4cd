"""Loading of one of an artifact's models, after its hashes were checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_train.artifact.store import MANIFEST, find_artifact, read_artifact
from dist_train.errors import ArtifactError, DataError
from dist_train.programs.program import Program, open_program

HALF = ("bf16", "fp16")


def load_artifact(path: Path | str, model: str | None = None) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """Verifies all hashes, then loads a model. Only for artifacts from a source you trust; see `artifact.store`.

    Args:
        path: an export directory, a run directory with one, or a model's file in it.
        model: one of the manifest's `models`, as int8, fp32, bf16, fp16; half is bf16 or fp16. None: the file that
            `path` names, else the manifest's `default`.

    Returns:
        The model as a function, and the manifest. The function takes float32 [B, C, H, W] on the CPU, normalized with
        the manifest's `normalization`. It returns float32, for a classification logits [B, classes], and raises
        DataError for another shape or dtype. A pt2 int8 model simulates int8 in float32 (quantize and dequantize):
        right, but not fast. For speed lower it (`dist_train.lowering.lower`), or write another format
        (`dist-train export`).

    Raises:
        ArtifactError: as `verify_artifact` and `open_program`; also for a model that the artifact does not hold.
    """
    path = Path(path)
    manifest, files = read_artifact(find_artifact(path))
    if model is None and path.suffix:
        model = next((name for name, entry in manifest["models"].items() if entry["file"] == path.name), None)
        if model is None and path.is_file() and path.name != MANIFEST:
            known = ", ".join(entry["file"] for entry in manifest["models"].values())
            raise ArtifactError(f"{path} is not a program that {MANIFEST} lists", f"one of: {known}")
    entry = manifest["models"][choose_model(manifest, model)]
    program = Program(entry["kind"], files[entry["file"]], {name: files[name] for name in entry.get("extra", [])})
    call = open_program(program)
    shape = tuple(manifest["input"]["shape"][1:])

    def answer(images: Tensor) -> Tensor:
        if images.dtype != torch.float32 or tuple(images.shape[1:]) != shape:
            sizes = ", ".join(map(str, shape))
            raise DataError(
                f"the model takes float32 [batch, {sizes}], but got {images.dtype} {list(images.shape)}",
                "convert and normalize the images as `input` and `normalization` of the manifest say",
            )
        with torch.no_grad():
            return call(images)

    return answer, manifest


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
