"""An artifact whose manifest lies, with hashes that are right, ends in our error before a file is opened."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_train.artifact import store
from dist_train.artifact.load import load_artifact
from dist_train.artifact.store import MANIFEST, verify_artifact, write_artifact
from dist_train.errors import ArtifactError
from tests.artifact.test_load import FIELDS, PROGRAM
from tests.support.crafted import MOST_MEGABYTES, refusal

LOAD = ("from dist_train.artifact.load import load_artifact", "load_artifact(sys.argv[1])")


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    write_artifact(tmp_path / "export", {PROGRAM: b"a program"}, FIELDS)
    return tmp_path / "export"


def lie(artifact: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edits the manifest and gives it the hash that its fields then have."""
    manifest = json.loads((artifact / MANIFEST).read_text())
    edit(manifest)
    (artifact / MANIFEST).write_bytes(store._manifest_bytes(manifest))


def put(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(manifest: dict[str, Any]) -> None:
        container: Any = manifest
        for key in path[:-1]:
            container = container[key]
        container[path[-1]] = value

    return edit


def without(*path: str) -> Callable[[dict[str, Any]], None]:
    def edit(manifest: dict[str, Any]) -> None:
        container: Any = manifest
        for key in path[:-1]:
            container = container[key]
        del container[path[-1]]

    return edit


_LISTED = {"sha256": "0" * 64, "bytes": 0}
LIES = {
    "a missing file": (put("models", "int8", "file", value="gone.pt2"), "the file 'gone.pt2' of 'int8' is not listed"),
    "a missing extra file": (put("models", "int8", "extra", value=["gone.pt"]), "the file 'gone.pt' of 'int8'"),
    "a shape of 10^9": (put("input", "shape", value=[None, 3, 10**9, 10**9]), r"input\.shape\.2"),
    "a large product": (put("input", "shape", value=[None, 3, 10**5, 10**5]), "input: an input has more than"),
    "a negative size": (put("input", "shape", value=[None, -3, 16, 16]), r"input\.shape\.1"),
    "no batch": (put("input", "shape", value=[2, 3, 16, 16]), "the first size, the batch, is null"),
    "a list of models": (put("models", value=["int8"]), "models: Input should be a valid dictionary"),
    "a list as input": (put("input", value=[3, 16, 16]), "input: Input should be"),
    "a list of files": (put("files", value=[PROGRAM]), "files: Input should be"),
    "classes that are numbers": (put("classes", value=[1, 2]), r"classes\.0"),
    "no classes": (without("classes"), "classes: Field required"),
    "no kind": (without("models", "int8", "kind"), r"models\.int8\.kind: Field required"),
    "another kind": (put("models", "int8", "kind", value="pickle"), r"models\.int8\.kind"),
    "another default": (put("default", value="fp32"), "the default, 'fp32', is none of the models"),
    "one mean": (put("normalization", "mean", value=[0.5]), "as many means as stds"),
    "NUL in a name": (put("files", "a\0b", value=_LISTED), "files"),
    "a name outside": (put("files", "../secret", value=_LISTED), "files"),
    "an absolute name": (put("files", "/etc/passwd", value=_LISTED), "files"),
    "the folder above": (put("files", "..", value=_LISTED), "a folder is listed"),
    "an escape in a name": (put("files", "\x1b[2J", value=_LISTED), "files"),
    "a negative length": (put("files", PROGRAM, "bytes", value=-1), r"files\.model\.pt2\.bytes"),
    "a length that is a text": (put("files", PROGRAM, "bytes", value="9"), r"files\.model\.pt2\.bytes"),
    "a short hash": (put("files", PROGRAM, "sha256", value="00"), r"files\.model\.pt2\.sha256"),
    "a resize of 10^9": (put("input", "resize", value=10**9), r"input\.resize"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_in_the_manifest_is_named_with_its_place(artifact: Path, name: str) -> None:
    edit, message = LIES[name]
    lie(artifact, edit)
    for read in (verify_artifact, load_artifact):
        with pytest.raises(ArtifactError, match=f"is not what an export writes: .*{message}"):
            read(artifact)


def test_the_manifest_of_an_export_has_no_mistake_and_later_fields_may_be_added(artifact: Path) -> None:
    lie(artifact, put("later", value={"any": [1, None]}))
    assert verify_artifact(artifact)["later"] == {"any": [1, None]}


def test_finished_tensors_have_no_mean_and_std(artifact: Path) -> None:
    lie(artifact, put("normalization", value={"mean": [], "std": []}))
    assert verify_artifact(artifact)["normalization"] == {"mean": [], "std": []}
    lie(artifact, put("input", "shape", value=[None, 7]))
    assert verify_artifact(artifact)["input"]["shape"] == [None, 7]


@pytest.mark.parametrize(
    "text",
    ["[]", "7", "[" * 100_000, '{"format": ' + "9" * 5000 + "}", '{"a": [' + "[]," * 300_000 + "[]]}", "\0", "NaN"],
    ids=["list", "number", "levels", "digits", "values", "nul", "nan"],
)
def test_a_manifest_that_is_no_table_is_refused(artifact: Path, text: str) -> None:
    (artifact / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged"):
        verify_artifact(artifact)


def test_a_file_s_length_is_looked_at_before_it_is_read(artifact: Path) -> None:
    with (artifact / PROGRAM).open("wb") as file:
        file.truncate(2 * 2**30)  # sparse
    found = refusal(*LOAD, artifact)
    assert found.kind == "ArtifactError"
    assert "has 2147483648 bytes, not 9" in found.text
    assert found.megabytes < MOST_MEGABYTES


def test_an_endless_manifest_and_a_pipe_in_place_of_a_program_are_refused(artifact: Path) -> None:
    (artifact / PROGRAM).unlink()
    os.mkfifo(artifact / PROGRAM)
    with pytest.raises(ArtifactError, match="it is not a file"):
        load_artifact(artifact)
    with (artifact / MANIFEST).open("wb") as file:
        file.truncate(2 * 2**30)
    found = refusal(*LOAD, artifact)
    assert found.kind == "ArtifactError"
    assert found.megabytes < MOST_MEGABYTES
