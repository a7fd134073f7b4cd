"""A rank that sees other data than the others ends the run on all of them, in words, before training."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from dist_train.errors import EXIT_FAILED
from dist_train.run_dir.files import read_json
from tests.support.ranks import call, train
from tests.support.small_runs import Runs

HERE = socket.gethostname()
REFUSED = {
    "a row less": ("training rows: 40 on rank 0", "39 on rank 1"),
    "evaluation only": ("evaluation rows: 10 on rank 0", "9 on rank 1"),
    "other content": ("items 0, 4, 8 and 13 more items of the training data: item 0 is float32 [1, 4, 4]", "on rank 1"),
    "one item": ("item 20 of the training data", "target 0 (hash "),
    "other labels": ("of the evaluation data: item 0 is float32 [1, 4, 4], target 0 on rank 0", "target 1 on rank 1"),
    "float labels": ("target 0 on rank 0", "target float32 [] on rank 1"),
    "class order": ("name of class 0: cat on rank 0", "dog on rank 1"),
    "statistics": ("mean: none on rank 0", "0.5 on rank 1"),
    "two fingerprints": ("fingerprint: one on rank 0", "other on rank 1"),
    "unreadable": ("item 39 of the training data", "not readable (item 39 of Rows: OSError: the disk is gone"),
    "kind": ("evaluation set: Rows on rank 0", "ImageArrays of [1, 4, 4] on rank 1"),
    "array beside rows": (
        "items 0, 1, 2 and 3 more items of the evaluation data",
        "item 0 is uint8 [1, 4, 4], target 0 (hash ",
    ),
    "kinds": ("training rows: 6 on rank 0", "40 on rank 1"),
    "sharded stream": ("item 0 of the training data", "target 1 on rank 1"),
    "groups": (" on rank 1", "data.split.by group divides by `groups` of the dataset: give every rank the same"),
    "nodes": ("fingerprint: ", " on rank 0", " on rank 1"),
}
TAKEN = {
    "nothing": "",
    "small integers": "",
    "stated": "",
    "stream": "",
    "unreadable on all": "",
    "random": "an item of the training data is not the same when it is read twice",
    "rounding": "items 0, 4, 8 and 13 more items of the training data differ by rounding between ranks",
}


def test_whatever_differs_is_refused_by_all_ranks_and_random_or_rounded_items_are_not() -> None:
    cases = [*REFUSED, *TAKEN]
    ranks = call(2, "tests.support.unlike_data:compare", cases)
    for case, first, second in zip(cases, *ranks, strict=True):
        assert first == second, f"{case}: the ranks say different things"
        error, *warnings = first
        if case in REFUSED:
            assert all(words in error for words in REFUSED[case]) and HERE in error, f"{case}: {error}"
            assert "the data unlike is not the same on all ranks: " in error and "  -> let the dataset give" in error
            assert not warnings
        else:
            assert error == "" and len(warnings) == bool(TAKEN[case]), f"{case}: {first}"
            assert not warnings or TAKEN[case] in warnings[0], case


@pytest.mark.slow
def test_copies_of_a_folder_are_the_same_data_and_a_changed_picture_is_not() -> None:
    first, second = call(2, "tests.support.unlike_data:compare_folders")
    copied, changed = first
    assert first == second and copied == ""
    assert "item 0 of the training data: item 0 is class0/000.jpg of " in changed and ") on rank 1" in changed
    assert changed.endswith("-> is data.root, ROOT, the same on each node? share it, or copy it whole")


@pytest.mark.parametrize(
    ("case", "said"), [("a row less", "training rows: 40 on rank 0"), ("other content", "of the training data")]
)
def test_a_run_whose_ranks_see_other_data_ends_before_training(case: str, said: str, tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    words = [str(runs.config), "--import", "tests.support.unlike_data", "--run.dir", str(tmp_path / "run")]
    words += ["--data.name", "unlike", "--data.args", f"{{case: {case}}}", "--model.args", "{hidden: 16, size: 4}"]
    with train(2, "run", *words) as ranks:
        assert ranks.wait(60) == [EXIT_FAILED, EXIT_FAILED], ranks.printed()
        for rank in range(2):
            printed = ranks.output(rank)
            assert "the data unlike is not the same on all ranks" in printed and said in printed, printed
            assert "Traceback" not in printed
    assert said in read_json(tmp_path / "run" / "status.json")["error"]
    assert not (tmp_path / "run" / "checkpoints").exists()
