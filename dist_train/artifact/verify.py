"""The proof: an artifact is loaded in a fresh isolated process, and what it answers is compared with the models in memory."""

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
    """The child's side of `verify_in_fresh_process`: reads `inputs` and writes `outputs` (safetensors files). formats: MODEL/FORMAT."""
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
    """Largest differences of a fresh process's answers, NaN where one is NaN.

    Attributes:
        models: absolute, of the programs by model. Zero is expected: the same operators run on the same number of threads.
        formats: of the files of formats by (model, format), in units of the largest output, from what their runtime answered in the
            process that wrote them. A user's own settings of a runtime may add otherwise.
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
    """Verifies an artifact in a folder of its own, before it takes the place of one that may be in use. Arguments as of the parts."""
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
    """Loads the artifact's models, and opens files of its formats, in a new isolated process (`python -I`, empty folder).

    inputs: float32 [B, C, H, W], normalised (handed over contiguous); expected: for each model to be compared what the
        model in memory answers to them, float32.
    deadline: seconds until the child and its process group are killed.
    answers: by model and format, what the files' runtimes answered to `inputs` here; of formats that are not built in nothing is
        known of how a file is opened, and they are passed over.

    Raises ArtifactError where the child fails, is late, or answers in another shape.
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

    def difference(name: str, right: Tensor) -> Tensor:
        if actual[name].shape != right.shape:
            raise ArtifactError(
                f"{name} of the artifact at {directory} answers with shape {list(actual[name].shape)}, "
                f"not {list(right.shape)}",
                EXPORT_AGAIN,
            )
        return (actual[name] - right.detach().cpu()).abs().max()

    return Differences(
        {name: float(difference(name, right)) for name, right in expected.items()},
        {
            (model, name): float(difference(f"{model}/{name}", right) / right.abs().max().clamp(min=1e-12))
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
        start_new_session=True,  # its own process group: whatever it starts dies with it
    )
    try:
        _, errors = child.communicate(timeout=deadline)
    except subprocess.TimeoutExpired:
        raise ArtifactError(
            f"{subject} did not answer in a fresh process within {deadline:g} s",
            "give it a longer deadline, or look for what keeps this machine busy",
        ) from None
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    if child.returncode != 0:
        reason = "\n".join(errors.strip().splitlines()[-8:]) or f"exit code {child.returncode}"
        raise ArtifactError(
            f"{subject} does not load in a fresh process (python -I):\n{reason}",
            "install torch and the formats' runtimes where `python -I` finds them (not through PYTHONPATH), then export again",
        )
