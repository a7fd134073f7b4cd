"""Parts of error texts: the nearest names, and the first line of another library's message."""

from __future__ import annotations

import os
import re

import pytest

from dist_train.errors import DistTrainError, ask_for, did_you_mean, escaped, first_line, nearest, printable


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


_ESCAPES = "\x1b[2J\x1b]8;;http://a\x07cat\x1b\\ \x9b31m \r\u202egnp.exe\x00\x7f"


def test_texts_of_others_are_printed_without_what_moves_a_terminal() -> None:
    error = DistTrainError(f"no file {_ESCAPES}\nsecond line\tand a tab", f"give {_ESCAPES}")
    for shown in (str(error), printable(_ESCAPES), escaped(_ESCAPES)):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", shown)
        assert r"\x1b[2J" in shown and r"\x9b31m" in shown and r"\u202egnp" in shown
    assert "\nsecond line\tand a tab\n" in str(error)
    assert escaped("a\nb\tc") == r"a\x0ab\x09c"
    assert printable("Grüße, 世界 👩\u200d🔬 100 %") == "Grüße, 世界 👩\u200d🔬 100 %"
