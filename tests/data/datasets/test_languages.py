"""The dataset `languages`: words of one language each, none of them in both splits."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dist_train.config.data import DataConfig
from dist_train.data.datasets.languages import _FOLDER, generated_words, languages
from dist_train.data.splits import Splits
from dist_train.data.text import ByteLines
from dist_train.errors import ConfigError, DataError

NAMES = ["one", "two", "three"]
LISTS = [_FOLDER / name for name in ("american-english", "ngerman", "french", "italian", "spanish")]
NO_LISTS = "apt-get install wamerican wngerman wfrench witalian wspanish"


def made(root: Path | None = None, **args: Any) -> Splits:
    return languages(DataConfig(name="languages", root=root, args=args))


def texts(split: object) -> list[tuple[str, int]]:
    assert isinstance(split, ByteLines)
    return [(split.text(index), split[index][1]) for index in range(len(split))]


def test_a_word_is_in_one_language_and_in_one_split() -> None:
    splits = made(source="generated", languages=NAMES, per_language=500)
    train, evaluation = texts(splits.train), texts(splits.eval)
    assert len({word for word, _ in [*train, *evaluation]}) == len(train) + len(evaluation)
    shares = [Counter(target for _, target in part) for part in (train, evaluation)]
    assert all(450 <= shares[0][target] + shares[1][target] <= 500 for target in range(3))
    assert all(abs(shares[1][target] - shares[0][target] / 9) <= 1 for target in range(3))
    assert splits.classes == tuple(NAMES) and splits.num_outputs == 3


def test_items_are_a_function_of_the_arguments() -> None:
    args: dict[str, Any] = {"source": "generated", "languages": NAMES, "per_language": 100}
    first, again, other = made(**args), made(**args), made(**args, seed=1)
    assert texts(first.train) == texts(again.train)
    assert texts(first.train) != texts(other.train)
    assert len({target for _, target in texts(first.eval)[:12]}) == 3, "the first rows are of all languages"


def test_a_line_has_words_of_its_own_split() -> None:
    splits = made(source="generated", languages=NAMES, per_language=100, words=3, max_length=200)
    words = [Counter(word for text, _ in texts(part) for word in text.split()) for part in (splits.train, splits.eval)]
    assert not words[0].keys() & words[1].keys()
    assert all(set(each.values()) == {3} for each in words), "each word in three lines"


def test_lists_are_read_in_lower_case_without_names_of_several_letters_or_signs(tmp_path: Path) -> None:
    shared = "hotel\nTaxi\n"
    (tmp_path / "a").write_text(shared + "it's\nab\n" + "\n".join(f"Wört{chr(97 + n)}" for n in range(20)))
    (tmp_path / "b").write_text(shared + "\n".join(f"mot{chr(97 + n)}" for n in range(20)))
    splits = made(tmp_path, languages=["a", "b"])
    found = {word for part in (splits.train, splits.eval) for word, _ in texts(part)}
    assert found == {f"{stem}{chr(97 + n)}" for stem in ("wört", "mot") for n in range(20)}


def test_a_missing_list_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ngerman") as caught:
        made(tmp_path, languages=["ngerman", "french"])
    assert "apt-get install" in caught.value.hint and "generated" in caught.value.hint
    for name in ("ngerman", "french"):
        (tmp_path / name).write_text("only\nthese\nwords\n")
    with pytest.raises(DataError, match="0 words that no other has"):
        made(tmp_path, languages=["ngerman", "french"])
    with pytest.raises(ConfigError, match="given twice"):
        made(languages=["french", "french"])


def test_generated_languages_differ_in_what_follows_a_letter() -> None:
    pairs = [Counter(word[at : at + 2] for word in generated_words(name, 300, 0) for at in range(len(word) - 1))
             for name in NAMES]  # fmt: skip
    common = [{pair for pair, _ in each.most_common(20)} for each in pairs]
    assert all(len(common[a] & common[b]) <= 4 for a in range(3) for b in range(a))


@pytest.mark.skipif(
    not all(path.exists() for path in LISTS) and "DIST_TRAIN_REQUIRE_ALL" not in os.environ,
    reason=f"only with Debian's word lists: {NO_LISTS}",
)
def test_debians_lists_give_five_languages() -> None:
    splits = made(per_language=200)
    assert splits.classes == ("English", "German", "French", "Italian", "Spanish")
    assert len(texts(splits.train)) == 900 and len(texts(splits.eval)) == 100
