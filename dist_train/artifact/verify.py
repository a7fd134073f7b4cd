"""Verification of an artifact: a fresh isolated process must give the outputs of the models in memory."""

from __future__ import annotations

import json
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

from dist_train import trees
from dist_train.artifact.load import load_artifact
from dist_train.artifact.store import EXPORT_AGAIN, verify_artifact, write_artifact
from dist_train.errors import ArtifactError
from dist_train.lowering.comparison import largest, relative_difference
from dist_train.lowering.openers import OPENERS
from dist_train.programs.operators import trust_operators, trusted
from dist_train.programs.signature import tree_of
from dist_train.trees import Tree

_FRESH_PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(int(sys.argv[5]))
from dist_train.artifact.verify import _answer_in_fresh_process
_answer_in_fresh_process(*sys.argv[2:5], sys.argv[6], sys.argv[7:])
"""


def _answer_in_fresh_process(directory: str, inputs: str, outputs: str, operators: str, formats: Sequence[str]) -> None:
    """Runs in the child of `verify_in_fresh_process`.

    Args:
        inputs, outputs: safetensors files that are read and written.
        operators: JSON, as of `trust_operators`.
        formats: as MODEL/FORMAT.
    """
    trust_operators(json.loads(operators))
    manifest = verify_artifact(directory)
    questions = _unpacked(load_file(inputs), [leaf["name"] for leaf in manifest.get("inputs", [])])["inputs"]
    models = manifest["models"]
    answers = {name: load_artifact(directory, name, postprocess=False)[0](questions) for name in models}
    for each in formats:
        model, _, name = each.partition("/")
        file = Path(directory) / models[model]["formats"][name]["files"][0]
        try:
            answers[each] = OPENERS[name](file, manifest.get("outputs", [""]))(questions)
        except Exception as error:
            sys.exit(f"{model} as {name}, {file.name}, cannot be opened and run: {error!r}")
    save_file(_packed(answers), outputs)


_LEAF = "\n"  # between the name of a tree and that of its leaf, in a file of tensors


def _packed(named: Mapping[str, Tree]) -> dict[str, torch.Tensor]:
    """Returns the leaves of some trees, for a file of tensors."""
    return {
        f"{name}{_LEAF}{leaf}" if leaf else name: tensor.detach().cpu().contiguous().clone()
        for name, tree in named.items()
        for leaf, tensor in trees.named_leaves(tree)
    }


def _unpacked(tensors: Mapping[str, torch.Tensor], order: Sequence[str] = ()) -> dict[str, Tree]:
    """Returns the trees of `_packed`. A file keeps no order: leaves come in `order`, as far as it names them."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, leaf = key.partition(_LEAF)
        found.setdefault(name, {})[leaf] = tensor
    places = {name: place for place, name in enumerate(order)}
    trees_of = {}
    for name, leaves in found.items():
        names = sorted(leaves, key=lambda leaf: places.get(leaf, len(places)))
        trees_of[name] = tree_of(names, [leaves[leaf] for leaf in names])
    return trees_of


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
    inputs: Tree,
    expected: Mapping[str, Tree],
    answers: Mapping[tuple[str, str], Tree],
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
    inputs: Tree,
    expected: Mapping[str, Tree],
    deadline: float,
    answers: Mapping[tuple[str, str], Tree] | None = None,
) -> Differences:
    """Loads the artifact's models, and opens its formats' files, in a new isolated process (`python -I`, empty folder).

    Args:
        inputs: [B, ...], such as normalized images (passed on contiguous).
        expected: by model, the outputs of the model in memory.
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
        save_file(_packed({"inputs": inputs}), questions)
        paths = [package_parent, os.path.abspath(directory), str(questions), str(outputs), str(torch.get_num_threads())]
        paths.append(json.dumps(trusted()))
        asked = [f"{model}/{name}" for model, name in formats]
        _run(
            [sys.executable, "-I", "-c", _FRESH_PROCESS, *paths, *asked],
            empty,
            deadline,
            f"the artifact at {directory}",
        )
        actual = _unpacked(load_file(outputs))

    def outputs_of(name: str, right: Tree) -> Tree:
        found, wanted = (
            {leaf: list(tensor.shape) for leaf, tensor in trees.named_leaves(tree)} for tree in (actual[name], right)
        )
        if found != wanted:
            said = [str(shapes.get("", shapes)) for shapes in (found, wanted)]
            raise ArtifactError(
                f"{name} of the artifact at {directory} answers with shape {said[0]}, not {said[1]}", EXPORT_AGAIN
            )
        return actual[name]

    return Differences(
        {name: _largest_difference(outputs_of(name, right), right) for name, right in expected.items()},
        {
            (model, name): relative_difference(
                outputs_of(f"{model}/{name}", right), trees.map_leaves(lambda leaf: leaf.detach().cpu(), right)
            )
            for (model, name), right in formats.items()
        },
    )


def _largest_difference(actual: Tree, expected: Tree) -> float:
    """Largest absolute difference of any leaf; of integers the share that differs."""
    right = dict(trees.named_leaves(expected))
    return largest(
        float(
            (tensor - right[name].detach().cpu()).abs().max()
            if tensor.is_floating_point()
            else (tensor != right[name].detach().cpu()).double().mean()
        )
        for name, tensor in trees.named_leaves(actual)
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
