"""Hugging Face's datasets from a folder: texts and images with a class, without a network."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train import hub
from dist_train.config.data import DataConfig, SplitConfig
from dist_train.data.datasets.args import read_args
from dist_train.data.datasets.huggingface import HuggingFaceArgs, huggingface
from dist_train.data.datasets.huggingface_rows import Bytes, _of_tokens
from dist_train.data.division import divided
from dist_train.data.splits import Splits
from dist_train.data.text import IGNORED, byte_tokens
from dist_train.errors import ConfigError, DataError

needs_datasets = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="only with datasets"),
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="only with transformers"),
]
TEXTS = ["good film", "a bad one", "fine", "no", "very good"]
CLASSES = ["pos", "neg", "pos", "neg", "pos"]


def splits(folder: Path | str, **args: Any) -> Splits:
    return huggingface(DataConfig(name=f"hf/{folder}", args=args))


def test_bytes_know_the_word_that_they_are_from() -> None:
    tokens, places = Bytes(6)([["ab", "cde"]])
    assert tokens == {"input_ids": byte_tokens("ab cde", 6), "attention_mask": [1] * 6}
    assert places == [0, 0, None, 1, 1, 1]
    assert Bytes(9)(["ab", "c"])[0]["input_ids"] == byte_tokens("ab c", 9), "a pair"
    assert Bytes(9)([""])[0] == {"input_ids": [0], "attention_mask": [0]}, "a model takes no rows of length 0"


def test_the_first_token_of_a_word_has_its_class() -> None:
    assert _of_tokens([5, 7], [None, 0, 0, 1, None]).tolist() == [IGNORED, 5, IGNORED, 7, IGNORED]


def test_arguments_that_contradict_each_other_are_named() -> None:
    with pytest.raises(ConfigError, match="must be at least size, 64"):
        read_args(DataConfig(name="hf/x", args={"size": 64, "resize": 32}), HuggingFaceArgs)


class TestWithDatasets:
    pytestmark = needs_datasets

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        import datasets

        rows = datasets.Dataset.from_dict({"sentence": TEXTS, "kind": CLASSES})
        datasets.DatasetDict({"train": rows, "test": rows.select([0, 1])}).save_to_disk(str(tmp_path / "saved"))
        return tmp_path / "saved"

    def test_texts_of_a_saved_dataset_as_bytes(self, folder: Path) -> None:
        found = splits(folder, text="sentence", label="kind", tokenizer="bytes", max_length=6)
        assert found.classes == ("neg", "pos") and len(found.eval) == 2  # type: ignore[arg-type]
        inputs, target = found.train[1]  # type: ignore[index]
        assert inputs["input_ids"].tolist() == byte_tokens("a bad one", 6) and target == 0

    def test_a_tokenizer_of_transformers(self, folder: Path, tmp_path: Path) -> None:
        import transformers

        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
        (tmp_path / "vocab.txt").write_text("\n".join(words))
        transformers.BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "tokenizer")
        found = splits(folder, text="sentence", label="kind", tokenizer=str(tmp_path / "tokenizer"))
        inputs, _ = found.train[0]  # type: ignore[index]
        assert inputs["input_ids"].tolist() == [2, 5, 7, 3]
        longest = found.train.longest()  # type: ignore[union-attr]
        assert longest["input_ids"].tolist() == [2, *[7] * 126, 3], "BART reads a text at its end token"
        assert found.collate is not None
        batch, targets = found.collate([found.train[0], found.train[1]])  # type: ignore[index]
        assert batch["input_ids"][0].tolist() == [2, 5, 7, 3, 0] and targets.tolist() == [1, 0]
        assert set(found.dynamic) == set(inputs)

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"text": [None]}, "row 5 of the split 'validation' has no text in the column 'text'"),
            ({"kind": [None]}, "row 5 of the split 'validation' has no class in the column 'kind'"),
            ({"kind": [-1]}, "'validation' has -1 in row 5, as in rows without a class"),
            ({"kind": [7]}, "'validation' has the class 7 in row 5, which is not in the split 'train'"),
            ({"words": [["a", None]], "tags": [[1, 1]]}, "row 5 of the split 'validation' has a word that is missing"),
            ({"words": [["a", "b"]], "tags": [[1]]}, "has 2 words (words) and 1 classes (tags)"),
            ({"tags": [[1, None]], "words": [["a", "b"]]}, "has a word without a class"),
        ],
    )
    def test_a_row_without_a_text_or_a_class_is_named_before_training(
        self, changed: dict[str, Any], said: str, tmp_path: Path
    ) -> None:
        import datasets

        rows = {"text": ["a"] * 5, "kind": [3, 1, 1, 3, 3], "words": [["a"]] * 5, "tags": [[1], [3], [1], [3], [-100]]}
        last = {name: changed.get(name, values[:1]) for name, values in rows.items()}
        wrong = {name: values + last[name] for name, values in rows.items()}
        parts = {"train": datasets.Dataset.from_dict(rows), "validation": datasets.Dataset.from_dict(wrong)}
        datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
        columns = {"text": "words", "label": "tags"} if "tags" in changed else {"text": "text", "label": "kind"}
        with pytest.raises(DataError) as caught:
            splits(tmp_path / "saved", tokenizer="bytes", **columns)
        assert said in caught.value.message and caught.value.hint
        fine = splits(tmp_path / "saved", tokenizer="bytes", eval="train", **columns)
        assert fine.classes == ("1", "3"), "numbers with gaps are no further classes"

    @pytest.mark.parametrize(
        ("columns", "said"),
        [
            ({"text": "number"}, "of Value('float64'), not texts or lists of words"),
            ({"label": "number"}, "of Value('float64'), which is no class"),
            ({"label": "pair"}, "which is no class"),
            ({"label": "tags"}, "has lists of classes, which are for the words of one text"),
            ({"text": ["text", "words"]}, "are one of texts and one of words"),
            ({"text": None, "image": "text"}, "of Value('string'), not images"),
        ],
    )
    def test_a_column_of_another_kind_is_named(self, columns: dict[str, Any], said: str, tmp_path: Path) -> None:
        import datasets

        row = {"text": "a", "kind": 0, "number": 0.5, "pair": {"a": 1}, "tags": [0], "words": ["a"]}
        rows = datasets.Dataset.from_list([row, {**row, "kind": 1}])
        rows.save_to_disk(str(tmp_path / "saved"))
        args = {"text": "text", "label": "kind", "tokenizer": "bytes", "eval": "train", **columns}
        with pytest.raises(DataError) as caught:
            splits(tmp_path / "saved", **{name: value for name, value in args.items() if value is not None})
        assert said in caught.value.message and caught.value.hint

    def test_names_of_classes_in_another_order_are_refused(self, tmp_path: Path) -> None:
        import datasets

        parts = {}
        for split, names in (("train", ["a", "b"]), ("test", ["b", "a"])):
            feature = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
            parts[split] = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]}, features=feature)
        datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
        with pytest.raises(DataError, match="same classes, in the same order"):
            splits(tmp_path / "saved", text="text", tokenizer="bytes")

    def test_a_dataset_without_an_evaluation_split_is_divided(self, tmp_path: Path) -> None:
        import datasets

        rows = datasets.Dataset.from_dict({"text": list("abcdefgh"), "label": [0, 1] * 4}).with_format("torch")
        rows.save_to_disk(str(tmp_path / "saved"))
        with pytest.raises(ConfigError, match="no split 'validation'") as caught:
            splits(tmp_path / "saved", text="text", tokenizer="bytes")
        assert "--data.split.eval 0.1" in caught.value.problems[0].hint
        data = DataConfig(
            name=f"hf/{tmp_path / 'saved'}",
            args={"text": "text", "tokenizer": "bytes"},
            split=SplitConfig(eval=0.5, by="class"),
        )
        found = divided(huggingface(data), data.split or SplitConfig(eval=0.5))
        targets = [[part[row][1] for row in range(len(part))] for part in (found.train, found.eval)]  # type: ignore[arg-type,index]
        assert sorted(targets[0]) == sorted(targets[1]) == [0, 0, 1, 1]

    def test_columns_and_splits_that_are_not_there_are_answered_with_those_that_are(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match="no column 'sentense'; there are sentence, kind") as caught:
            splits(folder, text="sentense", label="kind", tokenizer="bytes")
        assert "sentence" in caught.value.problems[0].hint
        with pytest.raises(ConfigError, match="no split 'dev'; there are train, test"):
            splits(folder, text="sentence", label="kind", tokenizer="bytes", eval="dev")
        with pytest.raises(ConfigError, match="there are sentence, kind"):
            splits(folder, label="kind")
        with pytest.raises(ConfigError, match="texts need a tokenizer"):
            splits(folder, text="sentence", label="kind")

    def test_files_of_a_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("train", "validation"):
            (tmp_path / f"{name}.jsonl").write_text('{"text": "ab", "label": 0}\n{"text": "c", "label": 1}\n')
        found = splits(tmp_path, text="text", tokenizer="bytes")
        assert found.classes == ("0", "1") and found.train[1][1] == 1  # type: ignore[index]

    def test_images(self, tmp_path: Path) -> None:
        import datasets
        import PIL.Image

        pixels = [PIL.Image.new("L", (20, 30), 100), PIL.Image.new("RGB", (40, 20), (1, 2, 3))]
        feature = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})
        rows = datasets.Dataset.from_dict({"image": pixels, "label": [1, 0]}, features=feature)
        datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(str(tmp_path / "saved"))
        found = splits(tmp_path / "saved", image="image", size=16, resize=18)
        image, target = found.train[0]  # type: ignore[index]
        assert image.shape == (3, 16, 16) and image.dtype == torch.uint8 and int(image[0, 0, 0]) == 100
        assert target == 1 and found.classes == ("dark", "light") and found.input_shape == (3, 16, 16)

    def test_a_hub_that_cannot_be_reached_is_asked_once(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        from huggingface_hub import constants

        for name in (*(f"{each}_proxy" for each in ("http", "https", "all")), "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # so that what is set is taken back
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
        hub._not_reached.cache_clear()
        try:
            with pytest.raises(DataError, match="no way to 127.0.0.1: .*refused") as caught:
                splits("nobody/nothing", text="text", tokenizer="bytes")
        finally:
            hub._not_reached.cache_clear()
        assert "hf download nobody/nothing" in caught.value.hint and "Retrying" not in caplog.text
        with pytest.raises(DataError, match="there is no folder /nobody/nothing"):
            splits("/nobody/nothing", text="text", tokenizer="bytes")

    def test_ways_to_a_hub_are_known_without_etc_services_and_through_any_proxy(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from huggingface_hub import constants

        monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # so that what is set is taken back
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", "https://127.0.0.1")
        monkeypatch.delattr(socket, "getservbyname")  # as good as in images that lack the file
        for name in ("http", "https", "all"):
            monkeypatch.delenv(f"{name}_proxy", raising=False)
            monkeypatch.delenv(f"{name.upper()}_PROXY", raising=False)
        monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:9")
        assert hub._not_reached.__wrapped__() == ""
        monkeypatch.delenv("all_proxy")
        assert "refused" in hub._not_reached.__wrapped__()

    def test_no_folder_and_no_network_says_what_to_type(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        with pytest.raises(DataError, match="nobody/nothing") as caught:
            splits("nobody/nothing", text="text", tokenizer="bytes")
        assert "hf download nobody/nothing --repo-type dataset" in caught.value.hint
