"""Text as bytes, and batches that are padded to the longest item."""

from __future__ import annotations

import torch

from dist_train.data.text import IGNORED, ByteLines, PadToLongest, byte_tokens


def test_a_text_is_its_bytes_plus_one_cut_off_at_max_length() -> None:
    assert byte_tokens("aé", 8) == [98, 196, 170]
    assert byte_tokens("aé", 2) == [98, 196]


def test_items_hold_tokens_mask_and_class() -> None:
    lines = ByteLines(["ab", "straße", "c"], [1, 0, 2], max_length=5)
    inputs, target = lines[1]
    assert inputs["input_ids"].tolist() == byte_tokens("straße", 5) and target == 0
    assert inputs["attention_mask"].tolist() == [1] * 5
    assert [len(lines[index][0]["input_ids"]) for index in range(len(lines))] == [2, 5, 1]
    assert lines.text(1) == "stra", "the cut divides a letter"


def test_the_fingerprint_tells_texts_ends_and_classes() -> None:
    made = [(["ab", "c"], [0, 1]), (["a", "bc"], [0, 1]), (["ab", "c"], [1, 0]), (["ab", "d"], [0, 1])]
    assert len({ByteLines(*each, max_length=8).fingerprint for each in made}) == 4
    assert ByteLines(["ab", "c"], [0, 1], 8).fingerprint == ByteLines(["ab", "c"], [0, 1], 8).fingerprint


def test_a_batch_is_padded_to_its_longest_item() -> None:
    lines = ByteLines(["ab", "abcd"], [1, 0], max_length=8)
    inputs, targets = PadToLongest({"input_ids": 7})([lines[0], lines[1]])
    assert inputs["input_ids"].tolist() == [[98, 99, 7, 7], [98, 99, 100, 101]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert targets.tolist() == [1, 0] and targets.dtype == torch.int64
    assert PadToLongest()([lines[0]])[0]["input_ids"].shape == (1, 2)


def test_classes_of_tokens_are_padded_with_the_ignored_one() -> None:
    items = [({"input_ids": torch.ones(size, dtype=torch.int64)}, torch.arange(size)) for size in (1, 3)]
    assert PadToLongest()(items)[1].tolist() == [[0, IGNORED, IGNORED], [0, 1, 2]]
