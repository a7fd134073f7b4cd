"""The doctor's look at a run's object store."""

from __future__ import annotations

import pytest

from dist_train.doctor import object_store
from dist_train.doctor.base import Subject
from dist_train.doctor.diagnose import diagnose
from tests.support.s3_server import S3, _s3_of_module, s3

__all__ = ["_s3_of_module", "s3"]
pytestmark = pytest.mark.heavy


def test_a_store_is_tried_and_nothing_is_left(s3: S3) -> None:
    (line,) = object_store.check(Subject(store=s3.address("tried")))
    assert line.level == "good"
    assert "s3://bucket/tried: 0 objects; listed, written, read and removed" in line.text
    assert s3.store("tried").sizes() == {}


def test_a_store_that_cannot_be_written_to_is_bad(s3: S3) -> None:
    (line,) = object_store.check(Subject(store="s3://no-bucket/x"))
    assert line.level == "bad"
    assert "s3://no-bucket/x could not be given" in line.text
    assert "the bucket and the credentials" in line.hint


def test_without_an_address_there_is_nothing_to_say() -> None:
    assert list(object_store.check(Subject())) == []


@pytest.mark.slow
def test_the_doctor_asks_the_store_of_the_configuration(s3: S3, capsys: pytest.CaptureFixture[str]) -> None:
    diagnose(["quickstart", "--run.dir", "s3://no-bucket/x"], ["machine"], False, False)
    said = capsys.readouterr().out
    assert "bad      s3://no-bucket/x could not be given" in said
