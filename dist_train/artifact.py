"""The artifact that a user deploys: `model.pt2` and `manifest.json` in one directory, written whole, verified before use.

Hashes detect damage, not malice: whoever can change the model can change the hashes, and `torch.export.load` of a prepared
file can run code (program.py refuses what it can recognise). Load artifacts only from where you trust.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_train.errors import ArtifactError, DataError
from dist_train.program import Program, load_program, open_program, program_bytes

__all__ = [
    "load_artifact",
    "load_program",
    "program_bytes",
    "verify_artifact",
    "verify_in_fresh_process",
    "write_artifact",
]

FORMAT = "dist_train.pt2/1"
PROGRAM = "model.pt2"
SCRIPT = "model.ts"
MANIFEST = "manifest.json"
_REQUIRED = ("input", "normalization", "classes", "ranges_sha256", "world_sizes", "metrics")
_EXPORT_AGAIN = "copy it again from where it was exported, or train again into a new --run.dir"


# ---- the directory ----------------------------------------------------------------------------------------------------


def _aside(directory: Path) -> Path:
    """Where the older artifact stands for the moment between the two renames of a replacement."""
    return directory.with_name(f".{directory.name}.old")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """Canonical text: what was not written by this function is damaged. `sha256` covers all other fields."""
    fields = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(fields, sort_keys=True, allow_nan=False)
    fields["sha256"] = _digest(text.encode())
    return (json.dumps(fields, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _write_file(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_to_replace_foreign_files(directory: Path) -> None:
    ours = (PROGRAM, SCRIPT, "state_dict.pt", MANIFEST)
    foreign = sorted(entry.name for entry in directory.iterdir() if entry.name not in ours)
    if foreign:
        raise ArtifactError(
            f"{directory} holds {foreign[0]!r}, which no export wrote: it would be deleted with the older artifact",
            "move it away, or export to another directory",
        )


def write_artifact(directory: Path, program: bytes | Program, manifest: Mapping[str, Any]) -> None:
    """Writes the artifact into `directory`: whole or not at all, and an older one stays whole until the new one stands.

    program: what `program_bytes` returned, or a Program of any kind, whose extra files are written beside it.
    manifest: `input` {"shape": [null, C, H, W], "dtype": "float32"}, `normalization` {"mean", "std"} (or null),
        `classes`, `ranges_sha256` (null for a float model), `world_sizes`, `metrics`, and any other JSON. Added here:
        `format`, `versions` (torch, torchao), `files` {name: {"sha256", "bytes"}} and the manifest's own `sha256`.
    Only one process writes at a time (rank 0).

    Raises ArtifactError where the file system refuses, or where `directory` holds files that are not an artifact's.
    """
    missing = [key for key in _REQUIRED if key not in manifest]
    assert not missing, f"the manifest lacks {missing}"
    made = program if isinstance(program, Program) else Program("pt2", program)
    written = {PROGRAM if made.kind == "pt2" else SCRIPT: made.data, **made.extra}
    content = {
        **manifest,
        "format": FORMAT,
        "versions": {**_versions(), **manifest.get("versions", {})},
        "files": {name: {"sha256": _digest(data), "bytes": len(data)} for name, data in written.items()},
    }
    files = {**written, MANIFEST: _manifest_bytes(content)}
    directory = Path(directory).resolve()
    temporary = directory.with_name(f".{directory.name}.new")
    aside = _aside(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        if directory.exists():
            _refuse_to_replace_foreign_files(directory)
        elif aside.exists():  # a replacement was killed between its two renames
            os.rename(aside, directory)
        for leftover in (temporary, aside):
            if leftover.exists():
                shutil.rmtree(leftover)
        temporary.mkdir()
        for name, data in files.items():
            _write_file(temporary / name, data)
        _sync_directory(temporary)
        if directory.exists():
            os.rename(directory, aside)
        os.rename(temporary, directory)
        _sync_directory(directory.parent)
        if aside.exists():
            shutil.rmtree(aside)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ArtifactError(
            f"the artifact could not be written to {directory}: {error}",
            "make room or rights there and run the same command again; an older artifact is still whole",
        ) from error


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"torch": torch.__version__, "torchao": version("torchao")}


def _read_file(directory: Path, name: str) -> bytes:
    try:
        return (directory / name).read_bytes()
    except FileNotFoundError:
        raise ArtifactError(f"{directory / name} is missing", _EXPORT_AGAIN) from None
    except OSError as error:
        raise ArtifactError(f"{directory / name} cannot be read: {error}", _EXPORT_AGAIN) from error


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    data = _read_file(directory, MANIFEST)
    try:
        manifest = json.loads(data)
        found = manifest["format"]
        whole = _manifest_bytes(manifest) == data
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # no JSON, no UTF-8, no object, NaN
        raise ArtifactError(f"{path} is damaged: {error}", _EXPORT_AGAIN) from error
    if found != FORMAT:
        raise ArtifactError(
            f"{path}: format {found!r} is not {FORMAT!r}, the one that this version reads",
            "pip install the dist-train that wrote it, or " + _EXPORT_AGAIN,
        )
    if not whole or not {PROGRAM, SCRIPT} & set(manifest.get("files", {})):
        raise ArtifactError(f"{path} is damaged or was edited: it does not match its own sha256", _EXPORT_AGAIN)
    return manifest


def _verified(directory: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest and the very bytes that were hashed, so that nothing can change between the check and the use."""
    directory = directory.resolve()
    if not directory.exists() and _aside(directory).exists():
        directory = _aside(directory)
    if not directory.is_dir():
        raise ArtifactError(f"there is no artifact at {directory}", "name the export directory, as in runs/NAME/export")
    manifest = _read_manifest(directory)
    files: dict[str, bytes] = {}
    for name, expected in manifest["files"].items():
        if Path(name).name != name:
            raise ArtifactError(f"{directory / MANIFEST} lists {name!r}, which is not a plain file name", _EXPORT_AGAIN)
        data = files[name] = _read_file(directory, name)
        if len(data) != expected["bytes"] or _digest(data) != expected["sha256"]:
            raise ArtifactError(
                f"{directory / name} is damaged: {len(data)} bytes with sha256 {_digest(data)[:12]}..., "
                f"but {MANIFEST} says {expected['bytes']} bytes with {expected['sha256'][:12]}...",
                "copy it again from where it came, or " + _EXPORT_AGAIN,
            )
    return manifest, files


def verify_artifact(directory: Path | str) -> dict[str, Any]:
    """The manifest, after every listed file was hashed. Nothing is deserialised but the manifest's JSON.

    Raises ArtifactError, naming the file, where one is missing or a byte differs (in the manifest too).
    """
    return _verified(Path(directory))[0]


def load_artifact(path: Path | str) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """Verifies all hashes, then loads: (model, manifest). Only from where you trust (see the module's head).

    model: takes float32 [B, C, H, W] on the CPU, already normalised with the manifest's `normalization`, and returns
        logits, float32 [B, classes]. It simulates int8 in float32 (quantize and dequantize): right, not fast; for speed
        lower it (`dist_train.lowering.lower`). Raises DataError for another shape or dtype.

    Raises ArtifactError as `verify_artifact` and `load_program` do.
    """
    manifest, files = _verified(Path(path))
    program = Program("pt2", files[PROGRAM]) if PROGRAM in files else Program("torchscript", files[SCRIPT])
    module = open_program(program)
    shape = tuple(manifest["input"]["shape"][1:])

    def model(images: Tensor) -> Tensor:
        if images.dtype != torch.float32 or tuple(images.shape[1:]) != shape:
            sizes = ", ".join(map(str, shape))
            raise DataError(
                f"the model takes float32 [batch, {sizes}], but got {images.dtype} {list(images.shape)}",
                "convert and normalise the images as `input` and `normalization` of the manifest say",
            )
        with torch.no_grad():
            return module(images)

    return model, manifest


# ---- the proof --------------------------------------------------------------------------------------------------------

_FRESH_PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(int(sys.argv[5]))
from dist_train.artifact import _answer_in_fresh_process
_answer_in_fresh_process(*sys.argv[2:5])
"""


def _answer_in_fresh_process(directory: str, inputs: str, outputs: str) -> None:
    """The child's side of `verify_in_fresh_process`: reads `inputs` and writes `outputs` (safetensors files)."""
    model, _ = load_artifact(directory)
    save_file({"outputs": model(load_file(inputs)["inputs"]).contiguous()}, outputs)


def verify_in_fresh_process(directory: Path, inputs: Tensor, expected: Tensor, deadline: float) -> float:
    """Loads the artifact in a new isolated process (`python -I`, empty folder) and compares its answer.

    inputs: float32 [B, C, H, W], normalised (handed over contiguous); expected: float32 [B, classes], the converted
        model's answer to them.
    deadline: seconds until the child and its process group are killed.
    Returns the largest absolute difference; NaN where an output is NaN. Zero is expected: the same operators run on the
    same number of threads.

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
        actual = load_file(answers)["outputs"]
    if actual.shape != expected.shape:
        raise ArtifactError(
            f"the artifact at {directory} answers with shape {list(actual.shape)}, not {list(expected.shape)}",
            _EXPORT_AGAIN,
        )
    return float((actual - expected.detach().cpu()).abs().max())


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
