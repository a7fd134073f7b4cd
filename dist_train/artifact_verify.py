"""The proof: an artifact is loaded in a fresh isolated process, and what it answers is compared with the models in memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_train.artifact import load_artifact
from dist_train.artifact_store import EXPORT_AGAIN, verify_artifact
from dist_train.errors import ArtifactError

_FRESH_PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(int(sys.argv[5]))
from dist_train.artifact_verify import _answer_in_fresh_process
_answer_in_fresh_process(*sys.argv[2:5])
"""


def _answer_in_fresh_process(directory: str, inputs: str, outputs: str) -> None:
    """The child's side of `verify_in_fresh_process`: reads `inputs` and writes `outputs` (safetensors files)."""
    questions = load_file(inputs)["inputs"]
    answers = {name: load_artifact(directory, name)[0](questions) for name in verify_artifact(directory)["models"]}
    save_file({name: answer.contiguous() for name, answer in answers.items()}, outputs)


def verify_in_fresh_process(
    directory: Path, inputs: Tensor, expected: Mapping[str, Tensor], deadline: float
) -> dict[str, float]:
    """Loads the artifact's models in a new isolated process (`python -I`, empty folder) and compares their answers.

    inputs: float32 [B, C, H, W], normalised (handed over contiguous); expected: for each model to be compared what the
        model in memory answers to them, float32.
    deadline: seconds until the child and its process group are killed.
    Returns the largest absolute difference of each; NaN where an output is NaN. Zero is expected: the same operators run
    on the same number of threads.

    Raises ArtifactError where the child fails, is late, or answers in another shape.
    """
    package_parent = str(Path(__file__).resolve().parents[1])
    with tempfile.TemporaryDirectory(prefix="dist_train-") as folder:
        files = Path(folder)
        empty = files / "empty"
        empty.mkdir()
        questions, answers = files / "inputs.safetensors", files / "outputs.safetensors"
        save_file({"inputs": inputs.detach().cpu().contiguous()}, questions)
        paths = [package_parent, os.path.abspath(directory), str(questions), str(answers), str(torch.get_num_threads())]
        _run([sys.executable, "-I", "-c", _FRESH_PROCESS, *paths], empty, deadline, f"the artifact at {directory}")
        actual = load_file(answers)
    for name, outputs in expected.items():
        if actual[name].shape != outputs.shape:
            raise ArtifactError(
                f"{name} of the artifact at {directory} answers with shape {list(actual[name].shape)}, "
                f"not {list(outputs.shape)}",
                EXPORT_AGAIN,
            )
    return {name: float((actual[name] - outputs.detach().cpu()).abs().max()) for name, outputs in expected.items()}


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
            "install torch where `python -I` finds it (not through PYTHONPATH), then export again",
        )
