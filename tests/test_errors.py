"""Parts of error texts: the nearest names, and the first line of another library's message."""

from __future__ import annotations

import os

import pytest

from dist_train.errors import DistTrainError, ask_for, did_you_mean, first_line, nearest


def test_the_nearest_names_come_first_and_far_ones_not_at_all() -> None:
    assert nearest("resnet81", ["vgg16", "resnet101", "resnet18"]) == ["resnet18", "resnet101"]
    assert nearest("resnet81", ["resnet101", "resnet18"], count=1) == ["resnet18"]
    assert nearest("zzz", ["resnet18"]) == []


def test_the_question_names_them_with_what_stands_before_each() -> None:
    assert did_you_mean("tran", ["train", "qat"], before="--") == "did you mean --train?"
    assert did_you_mean("zzz", ["train"]) == ask_for([]) == ""
    assert ask_for(["a", "b"]) == "did you mean a or b?"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("first\nsecond"), "first"),
        (ValueError("\n\n  later \n"), "later"),
        (KeyError(), "KeyError"),
        (OSError("   "), "OSError"),
        ("stderr of a program\nmore", "stderr of a program"),
    ],
)
def test_the_first_line_is_the_first_that_says_something(error: BaseException | str, line: str) -> None:
    assert first_line(error) == line


def test_names_that_are_no_utf8_are_escaped_in_errors() -> None:
    error = DistTrainError(os.fsdecode(b"caf\xe9/\xc3\xa9.png is empty"), "\ud800")
    assert str(error) == "caf\\xe9/\u00e9.png is empty\n  -> \\ud800"
