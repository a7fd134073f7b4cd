"""Checks columns of Hugging Face's datasets before training: texts, images and classes, in all rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_train.data.text import IGNORED
from dist_train.errors import DataError

_ROWS = 10_000  # that are read at once


@dataclass(frozen=True)
class Column:
    """A column of one split, for messages.

    Attributes:
        rows: the split, of datasets.
        split, name: of the split, and of the column in it.
    """

    rows: Any
    split: str
    name: str

    def __str__(self) -> str:
        return f"the column {self.name!r} of the split {self.split!r}"

    @property
    def feature(self) -> Any:
        return self.rows.features[self.name]

    @property
    def arrow_type(self) -> Any:
        return self.rows.features.arrow_schema.field(self.name).type

    def read(self) -> Any:
        """Returns all of it, a ChunkedArray of pyarrow."""
        return self.rows.select_columns([self.name]).with_format("arrow")[:][self.name]


def require_texts(column: Column) -> bool:
    """Checks that every row has a text, or a list of words. Returns True for words.

    Raises:
        DataError: the column is of another type, or a row or a word is missing; names the row.
    """
    import pyarrow.compute as compute

    words = _is_list(column.arrow_type)
    if not _is_text(column.arrow_type.value_type if words else column.arrow_type):
        texts = [field.name for field in column.rows.features.arrow_schema if _is_text(field.type)]
        raise DataError(
            f"{column} is of {column.feature}, not texts or lists of words",
            f"--data.args.text {' | '.join(texts)}" if texts else "give a dataset with a column of texts",
        )
    narrow = column.rows.select_columns([column.name]).with_format("arrow")
    for start in range(0, len(narrow), _ROWS):
        found = narrow[start : start + _ROWS][column.name]
        if found.null_count:
            row = start + compute.index(compute.is_null(found), True).as_py()
            raise _missing(column, row, "no text")
        if words and compute.list_flatten(found).null_count:
            row = start + next(at for at, each in enumerate(found.to_pylist()) if None in each)
            raise _missing(column, row, "a word that is missing")
    return words


def require_images(column: Column) -> None:
    """Raises DataError where a column is not one of images, or a row has none."""
    import datasets
    import pyarrow.compute as compute

    if not isinstance(column.feature, datasets.Image):
        images = [name for name, each in column.rows.features.items() if isinstance(each, datasets.Image)]
        raise DataError(
            f"{column} is of {column.feature}, not images",
            f"--data.args.image {' | '.join(images)}" if images else "give a dataset with a column of datasets.Image",
        )
    missing = compute.index(compute.is_null(column.read()), True).as_py()
    if missing >= 0:
        raise _missing(column, missing, "no image")


def require_a_class_a_word(words: Column, classes: Column) -> None:
    """Raises DataError where a row has not as many classes as words; names the row."""
    import pyarrow.compute as compute

    lengths = [compute.list_value_length(each.read()).to_numpy() for each in (words, classes)]
    differ = np.flatnonzero(lengths[0] != lengths[1])
    if len(differ):
        row = int(differ[0])
        raise DataError(
            f"row {row} of the split {words.split!r} has {lengths[0][row]} words ({words.name}) and {lengths[1][row]} "
            f"classes ({classes.name})",
            f"give each word a class; {IGNORED} for one that does not count",
        )


@dataclass(frozen=True)
class Classes:
    """The classes of a column: their names, and their indices by the column's values.

    Attributes:
        by_word: True where a row has a list of classes.
    """

    names: tuple[str, ...]
    indices: Mapping[Any, int]
    by_word: bool = False

    def targets(self, column: Column) -> np.ndarray | None:
        """Returns the index of the class of each row, int64 [rows]; None where a row has several."""
        if self.by_word:
            return None
        return np.array([self.indices[value] for value in column.read().to_pylist()], np.int64)

    def of(self, value: Any) -> Any:
        """Returns the index of a class, or a list of them. IGNORED stays, within a list."""
        if isinstance(value, (list, tuple)):
            return [IGNORED if each == IGNORED else self.indices[each] for each in value]
        return self.indices[value]


def read_classes(columns: Sequence[Column]) -> Classes:
    """Returns the classes of the first column by its feature; without one, by its values, sorted.

    Raises:
        DataError: a column is of no classes, a row has none, or a later column has others.
    """
    first = columns[0]
    by_word = _is_list(first.arrow_type)
    for column in columns:
        if _is_list(column.arrow_type) != by_word or _require_kind(column) != _require_kind(first):
            raise DataError(
                f"{first} is of {first.feature}, and {column} of {column.feature}",
                "give both splits the same classes, in the same order: dataset.cast_column(...) of datasets",
            )
    names = names_of(first)
    if names is not None:
        classes = Classes(names, {index: index for index in range(len(names))}, by_word)
    else:
        ordered = sorted(_values(first, by_word))
        classes = Classes(tuple(map(str, ordered)), {value: index for index, value in enumerate(ordered)}, by_word)
    if not classes.names:
        raise DataError(f"{first} has no class", "--data.args.label COLUMN")
    for column in columns:
        unknown = sorted(_values(column, by_word) - set(classes.indices))
        if unknown:
            known = "has no such name" if names is not None else f"is not in the split {first.split!r}"
            raise DataError(
                f"{column} has the class {unknown[0]!r} in row {_row_of(column, unknown[0], by_word)}, which {known}",
                "give both splits the same classes, or leave such rows out: dataset.filter(...) of datasets",
            )
    return classes


def names_of(column: Column) -> tuple[str, ...] | None:
    """Names of the classes by the column's feature, a ClassLabel or a list of them; None without one."""
    feature = getattr(column.feature, "feature", column.feature)
    names = getattr(feature, "names", None)
    return None if names is None else tuple(names)


def _require_kind(column: Column) -> object:
    """Returns the names of the classes, or the kind of a column without them; raises DataError for no classes."""
    import pyarrow

    kind = column.arrow_type.value_type if _is_list(column.arrow_type) else column.arrow_type
    names = names_of(column)
    if names is not None:
        return names
    for name in ("boolean", "integer"):
        if getattr(pyarrow.types, f"is_{name}")(kind):
            return name
    if _is_text(kind):
        return "text"
    hint = "--data.args.label COLUMN, of whole numbers or names"
    if pyarrow.types.is_floating(kind):
        hint += f'; or dataset.cast_column("{column.name}", datasets.Value("int64")) of datasets'
    raise DataError(f"{column} is of {column.feature}, which is no class", hint)


def _values(column: Column, by_word: bool) -> set[Any]:
    """Returns the values of a column but IGNORED in lists. Raises DataError where one is missing, or is negative."""
    import pyarrow.compute as compute

    found = column.read()
    if found.null_count:
        raise _missing(column, compute.index(compute.is_null(found), True).as_py(), "no class")
    flat = compute.list_flatten(found) if by_word else found
    values = set(flat.unique().to_pylist()) - ({IGNORED} if by_word else set())
    if None in values:
        raise _missing(column, _row_of(column, None, by_word), "a word without a class")
    negative = [value for value in values if isinstance(value, int) and value < 0]
    if negative:
        raise DataError(
            f"{column} has {negative[0]} in row {_row_of(column, negative[0], by_word)}, as in rows without a class",
            "leave such rows out: dataset.filter(...) of datasets; or name a split that has classes",
        )
    return values


def _row_of(column: Column, value: Any, by_word: bool) -> int:
    rows = column.read().to_pylist()
    return next(row for row, each in enumerate(rows) if (value in each if by_word else each == value))


def _missing(column: Column, row: int, what: str) -> DataError:
    hint = "leave such rows out: dataset.filter(...) of datasets"
    return DataError(f"row {row} of the split {column.split!r} has {what} in the column {column.name!r}", hint)


def _is_list(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind))


def _is_text(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))
