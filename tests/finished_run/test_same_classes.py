"""A finished run on other data: classes that are other numbers would be counted as if they were the model's."""

from __future__ import annotations

import pytest

from dist_train.errors import DataError
from dist_train.finished_run.open import require_same_numbers


def test_other_numbers_of_classes_are_refused() -> None:
    with pytest.raises(DataError, match="the model has the classes 0, 1, 2, and the data 1, 2, 3"):
        require_same_numbers(["0", "1", "2"], ("1", "2", "3"))
    require_same_numbers(["0", "1"], ("00", "01"))
    require_same_numbers(["cat", "1"], ("Cat", "2"))
    require_same_numbers([], ())
