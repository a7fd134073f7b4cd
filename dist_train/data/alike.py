"""Compares items and batches of a dataset, and names those that are not alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor

from dist_train.data.arrays import Batch
from dist_train.data.dynamic import Dynamic
from dist_train.data.items import Item, short
from dist_train.errors import DataError
from dist_train.trees import Tree, named_leaves

_IMAGES_OF_ONE_DTYPE = "give all items one dtype: uint8 images, which are normalized here, or finished floats"


def columns(what: str, trees: Sequence[Tree], items: Sequence[Item], name: str) -> list[list[Tensor]]:
    """Returns the tensors of all items leaf by leaf, in the order of the first item's leaves.

    Args:
        what: "inputs" or "targets".
        trees: these of each item.
        name: of the dataset.

    Raises:
        DataError: items have other leaves, shapes or (inputs) dtypes than the others; names two of them.
    """
    if all(isinstance(tree, Tensor) for tree in trees):
        tensors: list[Tensor] = list(trees)
        _require_alike(what, what, tensors, items, name)
        return [tensors]
    named = [dict(named_leaves(tree)) for tree in trees]
    if len({frozenset(each) for each in named}) > 1:
        said = [_leaves_in_words(tree) for tree in trees]
        raise _unlike(f"their {what} are", said, items, name, f"give all items the same {what}")
    found = [[each[leaf] for each in named] for leaf in named[0]]
    for leaf, tensors in zip(named[0], found, strict=True):
        _require_alike(what, f"{what}.{leaf}", tensors, items, name)
    return found


def _leaves_in_words(tree: Tree) -> str:
    return "a tensor" if isinstance(tree, Tensor) else f"a tree of {', '.join(name for name, _ in named_leaves(tree))}"


def _require_alike(what: str, leaf: str, tensors: list[Tensor], items: Sequence[Item], name: str) -> None:
    """Raises DataError where shapes differ, or inputs of two dtypes would be mixed; names two items."""
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) > 1:
        said = [str(list(shape)) for shape in shapes]
        raise _unlike(f"their {leaf} have shapes", said, items, name, _shape_hint(what, shapes))
    dtypes = [short(tensor.dtype) for tensor in tensors]
    if what == "inputs" and len(set(dtypes)) > 1:
        raise _unlike(f"their {leaf} have dtypes", dtypes, items, name, _dtype_hint(dtypes))


def _unlike(how: str, values: list[str], items: Sequence[Item], name: str, hint: str) -> DataError:
    usual = Counter(values).most_common(1)[0][0]
    odd = next(place for place, value in enumerate(values) if value != usual)
    pair = sorted((odd, values.index(usual)), key=lambda place: items[place].id)
    ids, said = (" and ".join(parts) for parts in ([str(items[at].id) for at in pair], [values[at] for at in pair]))
    return DataError(f"items {ids} of {name} are not alike: {how} {said}", hint)


def _dtype_hint(dtypes: Sequence[str]) -> str:
    return _IMAGES_OF_ONE_DTYPE if "uint8" in dtypes else "give this part of all items one dtype"


def _shape_hint(what: str, shapes: Sequence[tuple[int, ...]]) -> str:
    """Returns what to do about inputs or targets of these shapes, each without the batch's dimension."""
    padded = "pad them to the longest of a batch in Splits.collate, with a mask"
    if what == "targets":
        return f"give the targets of all items one shape, or {padded}"
    if {len(shape) for shape in shapes} != {3}:
        return f"give all items one shape, or {padded} (and name the dimension in Splits.dynamic)"
    if all(shapes) and len({shape[1:] for shape in shapes}) == 1 and {shape[0] for shape in shapes} <= {1, 3, 4}:
        return 'give all images the same channels, for example by image.convert("RGB")'
    return "give all items one shape, for example by torchvision.transforms.v2.Resize((height, width))"


def require_alike(
    first: Batch, batch: Batch, of_first: str, of_batch: str, dynamic: Dynamic | None = None, collated: bool = False
) -> None:
    """Raises DataError where a batch's inputs or targets differ from the first in leaves or shape, or inputs in dtype.

    Args:
        first, batch: of at least one row, each of rows that are alike.
        of_first, of_batch: where their items are from, for the message.
        collated: True where a `collate` made the batches, which may pad targets to other lengths.
    """
    one, other = int(first.ids[0]), int(batch.ids[0])
    items = f"items {one} and {other} of {of_first}"
    if of_first != of_batch:
        items = f"item {one} of {of_first} and item {other} of {of_batch}"
    for what in ("inputs", "targets"):
        pair = [getattr(each, what) for each in (first, batch)]
        ours, theirs = (dict(named_leaves(tree)) for tree in pair)
        if ours.keys() != theirs.keys():
            words = " and ".join(map(_leaves_in_words, pair))
            raise DataError(f"{items} are not alike: their {what} are {words}", f"give all items the same {what}")
        for name, leaf in ours.items():
            vary = (dynamic or {}).get(name, {}) if what == "inputs" else {}
            _require_like(items, what, name, (leaf, theirs[name]), vary, collated)


def _require_like(
    items: str, what: str, name: str, pair: tuple[Tensor, Tensor], vary: Mapping[int, str], collated: bool
) -> None:
    leaf = f"{what}.{name}" if name else what
    shapes = [tuple(each.shape[1:]) for each in pair]
    fixed = [tuple(size for at, size in enumerate(shape, start=1) if at not in vary) for shape in shapes]
    if len(shapes[0]) != len(shapes[1]) or (fixed[0] != fixed[1] and not (collated and what == "targets")):
        said = " and ".join(str(list(shape)) for shape in shapes)
        hint = _shape_hint(what, shapes)
        if collated and len(shapes[0]) == len(shapes[1]):
            at = next(at for at, sizes in enumerate(zip(*shapes, strict=True), start=1) if len(set(sizes)) > 1)
            hint = f'Splits(..., dynamic={{"{name}": {{{at}: "length"}}}}), where the lengths of batches may differ'
        raise DataError(f"{items} are not alike: their {leaf} have shapes {said}", hint)
    dtypes = [short(each.dtype) for each in pair]
    if what == "inputs" and dtypes[0] != dtypes[1]:
        said = " and ".join(dtypes)
        raise DataError(f"{items} are not alike: their {leaf} have dtypes {said}", _dtype_hint(dtypes))
