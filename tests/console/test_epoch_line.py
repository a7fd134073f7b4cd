"""The line after each evaluation, worded by the user."""

from __future__ import annotations

import pytest

from dist_train.console.progress import check_epoch_format, epoch_line

NAMES = ["top1", "loss"]


def test_the_tutorials_line_is_printed_as_the_tutorial_prints_it() -> None:
    line = epoch_line("Epoch [{epoch}/{epochs}], Acc: {top1:.4%}", "train", 1, 10, {"top1": 0.9153, "count": 100})
    assert line == "Epoch [1/10], Acc: 91.5300%"


@pytest.mark.parametrize(
    "template", ["no field", "{stage} {epoch:03d}/{epochs} {loss:.2f} {count}", "{{epoch}} {top1!r}"]
)
def test_a_right_format_has_no_mistake(template: str) -> None:
    assert check_epoch_format(template, NAMES) == []
    assert epoch_line(template, "train", 1, 2, {"top1": 0.5, "loss": 1.0, "count": 3})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{acc}", "has no field 'acc'"),
        ("{top5:.2f} {top1}", "has no field 'top5'"),
        ("{}", "has no field ''"),
        ("{0}", "has no field '0'"),
        ("{stage.__class__}", "has no field 'stage.__class__'"),
        ("{top1", "cannot be formatted: expected '}' before end of string"),
        ("{top1:.4q}", "cannot be formatted"),
        ("{stage:.2f}", "cannot be formatted"),
        ("{loss:{width}}", "cannot be formatted"),
    ],
)
def test_a_wrong_format_is_a_mistake_that_lists_the_fields(template: str, message: str) -> None:
    (problem,) = check_epoch_format(template, NAMES)
    assert problem.place == "log.epoch_format" and message in problem.message
    assert "the fields are stage, epoch, epochs, top1, loss, count" in problem.hint
