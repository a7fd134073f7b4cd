"""The count of work that is no training: lines where there is no terminal, and silence where nobody reads them."""

from __future__ import annotations

import io

from dist_train.console.counter import Counter


def test_the_end_is_said_with_what_an_earlier_call_did() -> None:
    stream = io.StringIO()
    counter = Counter("packing train", "images", stream=stream)
    counter.begin(1500, 1000)
    counter.count(400)
    assert stream.getvalue() == "", "not at every chunk"
    counter.count(100)
    counter.end()
    assert stream.getvalue().startswith("packing train: 1,500 of 1,500 images  ")


def test_others_are_silent() -> None:
    stream = io.StringIO()
    counter = Counter("packing train", "images", enabled=False, stream=stream)
    counter.begin(2, 0)
    counter.count(2)
    counter.end()
    assert stream.getvalue() == ""
