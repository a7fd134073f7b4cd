"""`languages`: which language is a word, or a line of words, from? By Debian's word lists, or by generated words."""

from __future__ import annotations

import unicodedata
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from dist_train.config.base import Count
from dist_train.config.data import DataConfig
from dist_train.data.datasets.args import NoArgs, read_args
from dist_train.data.permutation import Permutation, derive_key
from dist_train.data.splits import Splits
from dist_train.data.text import DYNAMIC, ByteLines, PadToLongest
from dist_train.errors import ConfigError, DataError, Problem, first_line

_FOLDER = Path("/usr/share/dict")
_NAMES = {  # of Debian's lists
    "american-english": "English",
    "british-english": "English",
    "ngerman": "German",
    "ogerman": "German",
    "french": "French",
    "italian": "Italian",
    "spanish": "Spanish",
}
_PACKAGES = "wamerican wngerman wfrench witalian wspanish"
_LEAST_LETTERS = 3
_HELD_OUT = 10  # every tenth word is evaluated
_LETTERS = 16  # of a generated language
_LENGTHS = (3, 11)  # of generated words


class LanguagesArgs(NoArgs):
    """Arguments of `languages`: where the words are from, how many, and how many make an item."""

    source: Literal["debian", "generated"] = "debian"
    """debian: word lists of data.root, /usr/share/dict unless given. generated: words of languages that are made up,
    for machines without such lists."""
    languages: Annotated[list[str], Field(min_length=2)] = [
        "american-english",
        "ngerman",
        "french",
        "italian",
        "spanish",
    ]
    """Names of the lists, a file with a word on each line; of generated languages any names."""
    per_language: Count = 10_000
    """Most words of each language, drawn by the seed; a tenth of them is evaluated."""
    words: Annotated[int, Field(ge=1, le=100)] = 1
    """Words of an item, with spaces between them. There are as many items as words."""
    max_length: Annotated[int, Field(ge=_LEAST_LETTERS, le=4096)] = 64
    """Most bytes of an item; the rest is cut off."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


def languages(data: DataConfig) -> Splits:
    """Words and the languages they are from, as bytes: inputs `input_ids` and `attention_mask`, int64 [S].

    Words are in lower case, of letters alone, at least three. A word that several lists have is left out. A word is in
    training or in evaluation, in no case in both. Items are a function of the lists and the arguments, `LanguagesArgs`.

    Raises:
        DataError: a list is missing, or has no words that the others have not.
    """
    args = read_args(data, LanguagesArgs)
    if len(set(args.languages)) < len(args.languages):
        hint = "--data.args.languages '[american-english, ngerman]'"
        raise ConfigError([Problem("data.args.languages", "a name is given twice", hint=hint)])
    if args.source == "generated":
        found = {name: generated_words(name, args.per_language, args.seed) for name in args.languages}
    else:
        found = {name: read_list(data.root or _FOLDER, name) for name in args.languages}
    counts = Counter(word for words in found.values() for word in words)
    train: list[tuple[str, int]] = []
    evaluation: list[tuple[str, int]] = []
    for target, (name, words) in enumerate(found.items()):
        own = sorted(word for word in words if counts[word] == 1)
        if len(own) < _HELD_OUT:
            message = f"the language {name} has {len(own)} words that no other has; {_HELD_OUT} are needed"
            raise DataError(message, "--data.args.languages with lists of different languages")
        drawn = [own[place] for place in _order(len(own), "words", args.seed, name)[: args.per_language]]
        held_out = max(1, len(drawn) // _HELD_OUT)
        train += [(line, target) for line in _lines(drawn[held_out:], args, name)]
        evaluation += [(line, target) for line in _lines(drawn[:held_out], args, name)]
    named = tuple(_NAMES.get(name, name) for name in args.languages)
    shown = named if len(set(named)) == len(named) else tuple(args.languages)
    return Splits(
        train=_mixed(train, args),
        eval=_mixed(evaluation, args),
        num_classes=len(shown),
        classes=shown,
        collate=PadToLongest(),
        dynamic=DYNAMIC,
    )


def read_list(folder: Path, name: str) -> set[str]:
    """Returns the words of a list, a file with a word on each line in UTF-8.

    Raises:
        DataError: there is no such list, or it is no text.
    """
    path = folder / name
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read the word list {path}: {first_line(error)}",
            f"apt-get install {_PACKAGES}; or --data.root FOLDER with files {name}, ...; "
            "or --data.args.source generated",
        ) from error
    words = (unicodedata.normalize("NFC", line.strip().lower()) for line in text.splitlines())
    return {word for word in words if word.isalpha() and len(word) >= _LEAST_LETTERS}


def generated_words(name: str, count: int, seed: int) -> set[str]:
    """Returns about `count` words of a language that is made up, a function of the arguments.

    Letters follow each other by a Markov chain that is drawn for the language: some pairs are common, most are rare.
    """
    generator = np.random.Generator(np.random.Philox(derive_key("language", name, seed)))
    letters = [chr(ord("a") + int(place)) for place in generator.permutation(26)[:_LETTERS]]
    chain = np.cumsum(generator.dirichlet(np.full(_LETTERS, 0.2), _LETTERS), axis=1)
    words: set[str] = set()
    for _ in range(2 * count):  # some are drawn twice
        places = [int(generator.integers(_LETTERS))]
        for drawn in generator.random(int(generator.integers(*_LENGTHS)) - 1):
            places.append(min(int(np.searchsorted(chain[places[-1]], drawn)), _LETTERS - 1))
        words.add("".join(letters[place] for place in places))
        if len(words) == count:
            break
    return words


def _order(size: int, *key: int | str) -> list[int]:
    order: list[int] = Permutation(size, derive_key(*key))(np.arange(size)).tolist()
    return order


def _lines(words: list[str], args: LanguagesArgs, name: str) -> list[str]:
    """Returns as many lines as words, of `args.words` each; every word is the first of one."""
    columns = [words]
    for column in range(1, args.words):
        columns.append([words[place] for place in _order(len(words), "line", args.seed, name, column)])
    return [" ".join(parts) for parts in zip(*columns, strict=True)]


def _mixed(items: list[tuple[str, int]], args: LanguagesArgs) -> ByteLines:
    """Puts the languages in a drawn order, so that the first rows, which some checks take, are of all."""
    chosen = [items[place] for place in _order(len(items), "rows", args.seed)]
    return ByteLines([text for text, _ in chosen], [target for _, target in chosen], args.max_length)
