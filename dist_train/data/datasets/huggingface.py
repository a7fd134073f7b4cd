"""`hf/FOLDER` and `hf/NAME`: Hugging Face's datasets, of texts or images with a class. Needs the extra `hf`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from dist_train import hub
from dist_train.config.base import Count, Pixels
from dist_train.config.data import DataConfig
from dist_train.data.datasets.args import NoArgs, read_args
from dist_train.data.datasets.huggingface_columns import (
    Classes,
    Column,
    read_classes,
    require_a_class_a_word,
    require_images,
    require_texts,
)
from dist_train.data.datasets.huggingface_rows import Bytes, Images, Texts, Tokenize, Tokenizer
from dist_train.data.splits import Splits
from dist_train.data.text import PADDING, PadToLongest
from dist_train.errors import ConfigError, DataError, Problem, ask_for, nearest

BYTES = "bytes"
_EVALUATION = ("validation", "test", "eval", "dev")  # names of splits, in the order in which one is taken
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's images, as for image_folder


class HuggingFaceArgs(NoArgs):
    """Arguments of `hf/...`: the columns that are taken, and what is made of them."""

    text: Annotated[list[str], Field(min_length=1, max_length=2)] | str | None = None
    """Column of texts, or two for pairs of them. A text may be a list of words, with a class for each."""
    image: str | None = None
    """Column of images."""
    label: str = "label"
    """Column of classes: integers, or names; a list of integers for the words of a text."""
    tokenizer: str | None = None
    """Folder or name of a tokenizer on the hub; bytes: each byte is a token, 1 to 256, and 0 is padding."""
    max_length: Count = 128
    """Most tokens of an item; the rest is cut off."""
    size: Pixels = 224
    """Pixels of an image's edge."""
    resize: Pixels = 256
    """Pixels of an image's shorter edge before the centre is cut out."""
    train: str = "train"
    """Split to train on."""
    eval: str | None = None
    """Split to evaluate on; validation, test, eval or dev, whichever is there, unless given."""
    subset: str | None = None
    """Configuration of the dataset, where it has several."""

    @model_validator(mode="after")
    def _sizes(self) -> HuggingFaceArgs:
        if self.resize < self.size:
            raise ValueError(f"resize, {self.resize}, must be at least size, {self.size}, which is cut out of it")
        return self


def huggingface(data: DataConfig) -> Splits:
    """A dataset of a folder (of `save_to_disk`, or of csv, json or parquet files), or of a name on the hub.

    Of texts, an item has what the tokenizer returns, int64 [S] each (`input_ids`, `attention_mask`); of images, it is
    uint8 [3, size, size]. Code that a dataset brings is never run.

    Raises:
        ConfigError: a column or a split that is not there; the message has those that are.
        DataError: the dataset or the tokenizer cannot be read, or a row has no text, image or class.
    """
    args = read_args(data, HuggingFaceArgs)
    # A tokenizer's threads do not survive the fork to worker processes; those are parallel enough.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parts = _loaded(hub.bare(data.name), args)
    chosen = {args.train: _split(parts, args.train, "train")}
    if data.split is None:
        name = _evaluation(parts, args)
        chosen[name] = _split(parts, name, "eval")
    texts = [args.text] if isinstance(args.text, str) else list(args.text or ())
    if bool(texts) == (args.image is not None):
        columns = ", ".join(chosen[args.train].column_names)
        message = f"name the column of texts or that of images; there are {columns}"
        raise ConfigError([Problem("data.args.text", message, hint="--data.args.text COLUMN, or --data.args.image")])
    for key, named in (("text", texts), ("image", [args.image] if args.image else []), ("label", [args.label])):
        for column in named:
            _require_column(list(chosen.values()), key, column)
    classes = _checked(chosen, texts, args)
    count = len(classes.names)
    train, evaluation = chosen[args.train], chosen[name] if data.split is None else None
    if args.image is not None:
        sizes = (args.image, args.label, args.size, args.resize)
        seen, held_out = (None if part is None else Images(part, *sizes, classes) for part in (train, evaluation))
        assert seen is not None
        return Splits(seen, held_out, count, classes.names, _MEAN, _STD, resize=args.resize)
    tokenize, values = _tokenizer(args)
    made = Texts(train, texts, args.label, tokenize, classes)
    return Splits(
        train=made,
        eval=None if evaluation is None else Texts(evaluation, texts, args.label, tokenize, classes),
        num_classes=count,
        classes=classes.names,
        collate=PadToLongest(values),
        dynamic={name: {1: "sequence"} for name in made[0][0]},
    )


def _checked(chosen: Mapping[str, Any], texts: Sequence[str], args: HuggingFaceArgs) -> Classes:
    """Checks all rows of the columns that are taken, and returns the classes. The first split is that to train on.

    Raises:
        DataError: a column has no texts, images or classes, or a row has none; names split and row.
    """
    labels = [Column(rows, split, args.label) for split, rows in chosen.items()]
    classes = read_classes(labels)
    for label in labels:
        if args.image is not None:
            require_images(Column(label.rows, label.split, args.image))
        columns = [Column(label.rows, label.split, each) for each in texts]
        by_word = [require_texts(each) for each in columns]
        if len(set(by_word)) > 1:
            raise DataError(f"{columns[0]} and {columns[1]} are one of texts and one of words", "name two of a kind")
        if classes.by_word and by_word != [True]:
            raise DataError(
                f"{label} has lists of classes, which are for the words of one text",
                "--data.args.text COLUMN, one of lists of words; or --data.args.label COLUMN, a class each",
            )
        if classes.by_word:
            require_a_class_a_word(columns[0], label)
    return classes


def _loaded(name: str, args: HuggingFaceArgs) -> Mapping[str, Any]:
    """Returns the dataset's splits by name."""
    import datasets

    saved = any((Path(name) / each).is_file() for each in ("dataset_dict.json", "state.json"))
    with hub.reading("dataset", name):
        found = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, args.subset)
    parts = found if isinstance(found, Mapping) else {args.train: found}
    return {split: rows.with_format(None) for split, rows in parts.items()}  # a saved one may give tensors


def _evaluation(parts: Mapping[str, Any], args: HuggingFaceArgs) -> str:
    return args.eval or next((name for name in _EVALUATION if name in parts), _EVALUATION[0])


def _split(parts: Mapping[str, Any], name: str, key: str) -> Any:
    if name not in parts:
        message = f"the dataset has no split {name!r}; there are {', '.join(parts)}"
        others = [each for each in parts if key == "train" or each != "train"]
        hint = f"--data.args.{key} {others[0]}" if others else ""
        if key == "eval":
            hint += f"{'; or ' if others else ''}--data.split.eval 0.1 makes one of rows of the training split"
        raise ConfigError([Problem(f"data.args.{key}", message, hint=hint)])
    if not len(parts[name]):
        full = [each for each in parts if len(parts[each])]
        message = f"the split {name!r} has no rows"
        hint = f"--data.args.{key} {full[0]}" if full else "give a dataset with rows"
        raise ConfigError([Problem(f"data.args.{key}", message, hint=hint)])
    return parts[name]


def _require_column(parts: Sequence[Any], key: str, column: str) -> None:
    for part in parts:
        if column not in part.column_names:
            message = f"there is no column {column!r}; there are {', '.join(part.column_names)}"
            hint = ask_for(nearest(column, part.column_names)) or f"--data.args.{key} {part.column_names[0]}"
            raise ConfigError([Problem(f"data.args.{key}", message, hint=hint)])


def _tokenizer(args: HuggingFaceArgs) -> tuple[Tokenize, dict[str, int]]:
    """Returns what makes tokens, and the numbers to pad with by the name of an input."""
    name = args.tokenizer
    if name is None:
        hint = f"--data.args.tokenizer NAME_OR_FOLDER, or {BYTES}"
        raise ConfigError([Problem("data.args.tokenizer", "texts need a tokenizer", hint=hint)])
    if name == BYTES:
        return Bytes(args.max_length), {"input_ids": PADDING}
    from transformers import AutoTokenizer

    with hub.reading("tokenizer", name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    padding = tokenizer.pad_token_id
    return Tokenizer(tokenizer, args.max_length), {"input_ids": PADDING if padding is None else padding}
