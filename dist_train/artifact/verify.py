"""Verification of an artifact: a fresh isolated process must give the outputs of the models in memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_train.artifact.load import load_artifact
from dist_train.artifact.store import EXPORT_AGAIN, verify_artifact, write_artifact
from dist_train.errors import ArtifactError
from dist_train.lowering.comparison import relative_difference
from dist_train.lowering.openers import OPENERS

_FRESH_PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(int(sys.argv[5]))
from dist_train.artifact.verify import _answer_in_fresh_process
_answer_in_fresh_process(*sys.argv[2:5], sys.argv[6:])
"""


def _answer_in_fresh_process(directory: str, inputs: str, outputs: str, formats: Sequence[str]) -> None:
    """Runs in the child of `verify_in_fresh_process`.

    Args:
        inputs, outputs: safetensors files that are read and written.
        formats: as MODEL/FORMAT.
    """
    questions = load_file(inputs)["inputs"]
    models = verify_artifact(directory)["models"]
    answers = {name: load_artifact(directory, name)[0](questions) for name in models}
    for each in formats:
        model, _, name = each.partition("/")
        file = Path(directory) / models[model]["formats"][name]["files"][0]
        try:
            answers[each] = OPENERS[name](file)(questions)
        except Exception as error:
            sys.exit(f"{model} as {name}, {file.name}, cannot be opened and run: {error!r}")
    save_file({name: answer.contiguous() for name, answer in answers.items()}, outputs)


@dataclass(frozen=True)
class Differences:
    """Largest differences of a fresh process's outputs, NaN where one is NaN.

    Attributes:
        models: absolute, by model. Zero is expected: the same operators run on the same number of threads.
        formats: by model and format, in units of the largest output, from the outputs of the runtime that wrote the
            file. Rounding is expected: the fresh process opens the file with a user's settings.
    """

    models: dict[str, float]
    formats: dict[tuple[str, str], float]


def prove(
    files: Mapping[str, bytes],
    manifest: Mapping[str, Any],
    inputs: Tensor,
    expected: Mapping[str, Tensor],
    answers: Mapping[tuple[str, str], Tensor],
    deadline: float,
) -> Differences:
    """Verifies an artifact in a temporary folder, before it replaces one that may be in use.

    Arguments as of `write_artifact` and `verify_in_fresh_process`.
    """
    with tempfile.TemporaryDirectory(prefix="dist_train-") as beside:
        trial = Path(beside) / "export"
        write_artifact(trial, files, manifest)
        return verify_in_fresh_process(trial, inputs, expected, deadline, answers)


def verify_in_fresh_process(
    directory: Path,
    inputs: Tensor,
    expected: Mapping[str, Tensor],
    deadline: float,
    answers: Mapping[tuple[str, str], Tensor] | None = None,
) -> Differences:
    """Loads the artifact's models, and opens its formats' files, in a new isolated process (`python -I`, empty folder).

    Args:
        inputs: float32 [B, C, H, W], normalized (passed on contiguous).
        expected: by model, the outputs of the model in memory, float32.
        deadline: seconds until the child and its process group are killed.
        answers: by model and format, the outputs of the files' runtimes here. Only built-in formats are opened.

    Raises:
        ArtifactError: the child fails, is late, or its outputs have another shape.
    """
    formats = {key: right for key, right in (answers or {}).items() if key[1] in OPENERS}
    package_parent = str(Path(__file__).resolve().parents[2])
    with tempfile.TemporaryDirectory(prefix="dist_train-") as folder:
        files = Path(folder)
        empty = files / "empty"
        empty.mkdir()
        questions, outputs = files / "inputs.safetensors", files / "outputs.safetensors"
        save_file({"inputs": inputs.detach().cpu().contiguous()}, questions)
        paths = [package_parent, os.path.abspath(directory), str(questions), str(outputs), str(torch.get_num_threads())]
        asked = [f"{model}/{name}" for model, name in formats]
        _run(
            [sys.executable, "-I", "-c", _FRESH_PROCESS, *paths, *asked],
            empty,
            deadline,
            f"the artifact at {directory}",
        )
        actual = load_file(outputs)

    def outputs_of(name: str, right: Tensor) -> Tensor:
        if actual[name].shape != right.shape:
            raise ArtifactError(
                f"{name} of the artifact at {directory} answers with shape {list(actual[name].shape)}, "
                f"not {list(right.shape)}",
                EXPORT_AGAIN,
            )
        return actual[name]

    return Differences(
        {name: float((outputs_of(name, right) - right.detach().cpu()).abs().max()) for name, right in expected.items()},
        {
            (model, name): relative_difference(outputs_of(f"{model}/{name}", right), right.detach().cpu())
            for (model, name), right in formats.items()
        },
    )


def _run(command: list[str], folder: Path, deadline: float, subject: str) -> None:
    child = subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process group of its own, so that its children can be killed too
    )
    try:
        _, errors = child.communicate(timeout=deadline)
    except subprocess.TimeoutExpired:
        raise ArtifactError(
            f"{subject} did not answer in a fresh process within {deadline:g} s",
            "give it a longer deadline, or free this machine of other load",
        ) from None
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    if child.returncode != 0:
        reason = "\n".join(errors.strip().splitlines()[-8:]) or f"exit code {child.returncode}"
        raise ArtifactError(
            f"{subject} does not load in a fresh process (python -I):\n{reason}",
            "install torch and the formats' runtimes where `python -I` finds them (not through PYTHONPATH), "
            "then export again",
        )
