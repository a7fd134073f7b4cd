"""Tests finding images, and printing what was predicted for them."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
import torch

from dist_train.errors import ArtifactError, DataError, UsageError
from dist_train.finished_run.predict import Prediction, image_files, predict, require_format, shown


def test_folders_and_patterns_are_expanded_in_order_and_other_files_left_out(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "sub/c.webp", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert image_files([str(tmp_path)]) == [str(tmp_path / name) for name in ("a.JPG", "b.png", "sub/c.webp")]
    assert image_files([str(tmp_path / "**" / "*.webp")]) == [str(tmp_path / "sub" / "c.webp")]
    assert image_files([str(tmp_path / "notes.txt")]) == [str(tmp_path / "notes.txt")]  # any suffix
    with pytest.raises(DataError, match=r"there is no file .*\*\.gif"):
        image_files([str(tmp_path / "*.gif")])


def test_hidden_files_and_folders_are_left_out_of_a_folder(tmp_path: Path) -> None:
    for name in ("a.png", "._a.png", ".cache/b.png", "album.png/c.png", ".photos/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = [str(tmp_path / name) for name in ("a.png", "album.png/c.png")]
    assert image_files([str(tmp_path)]) == found
    assert image_files([str(tmp_path / "**" / "*.png")]) == found, "album.png is a folder"
    named = str(tmp_path / ".photos")
    assert image_files([named]) == [f"{named}/d.png"], "a hidden folder that was named is read"


def test_a_link_that_leads_nowhere_costs_its_own_row(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "nowhere")
    assert image_files([str(tmp_path / "a.png")]) == image_files([str(tmp_path)]) == [str(tmp_path / "a.png")]


def test_other_tasks_give_their_raw_outputs_and_only_as_json() -> None:
    manifest = {"task": "regression", "classes": []}
    text = shown(Prediction("a.png", torch.tensor([0.5, -1.0])), manifest, "json", 1)
    assert text == '{"file": "a.png", "outputs": [0.5, -1.0]}'
    with pytest.raises(UsageError, match="csv is for classification and detection, not for regression"):
        require_format(manifest, "csv")


def test_a_comma_in_a_file_s_name_does_not_break_the_csv() -> None:
    manifest = {"task": "classification", "classes": ["cat", "dog"]}
    text = shown(Prediction("a,b.png", torch.tensor([0.0, 1.0])), manifest, "csv", 2)
    assert text == '"a,b.png",dog,0.731059\n"a,b.png",cat,0.268941'


def test_names_that_are_no_utf8_are_printed_escaped() -> None:
    name = os.fsdecode(b"caf\xe9/\xe9t\xe9.png")
    manifest = {"task": "classification", "classes": ["cat"]}
    assert shown(Prediction(name, torch.tensor([0.0])), manifest, "csv", 1) == r"caf\xe9/\xe9t\xe9.png,cat,1.000000"
    found = json.loads(shown(Prediction(name, torch.tensor([0.0])), manifest, "json", 1))
    assert found["file"] == r"caf\xe9/\xe9t\xe9.png"


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("=1+1.png", "'=1+1.png"),
        ("@SUM(A1).png", "'@SUM(A1).png"),
        ("+cmd|' /C calc'!A0", "'+cmd|' /C calc'!A0"),
        ("-2+3", "'-2+3"),
        ("\t=1", "\\x09=1"),
        ("-1", "-1"),
        ("\x1b[2Jcat", "\\x1b[2Jcat"),
        ("two\nlines", "two\\x0alines"),
    ],
)
def test_names_that_a_spreadsheet_or_terminal_would_obey_are_text(name: str, cell: str) -> None:
    manifest = {"task": "classification", "classes": [name]}
    text = shown(Prediction(name, torch.tensor([0.0])), manifest, "csv", 1)
    assert next(csv.reader([text])) == [cell, cell, "1.000000"]
    assert json.loads(shown(Prediction("a.png", torch.tensor([0.0])), manifest, "json", 1))["predictions"][0] == {
        "class": name,
        "probability": 1.0,
    }


@pytest.mark.parametrize(
    ("shape", "said"), [([None, 7], "not images"), ([None, 3, 8, 8], "trained on finished tensors")]
)
def test_a_model_of_finished_tensors_does_not_guess_what_an_image_becomes(
    shape: list[int | None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = {"input": {"shape": shape}, "normalization": {"mean": [], "std": []}, "classes": []}
    monkeypatch.setattr("dist_train.finished_run.predict.load_artifact", lambda *_, **__: (None, manifest))
    with pytest.raises(ArtifactError, match=said):
        next(predict("export", ["a.png"]))
