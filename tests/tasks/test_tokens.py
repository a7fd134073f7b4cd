"""The task `tokens`: padding counts nowhere, and batches of unlike lengths go together."""

from __future__ import annotations

import pytest
import torch

from dist_train.errors import DataError
from dist_train.tasks.tokens import Tokens

TARGETS = torch.tensor([[0, 2, -100], [1, -100, -100]])
ANSWERS = torch.tensor([[0, 1, 2], [1, 0, 0]])


def outputs(answers: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(answers, 3).float().transpose(1, 2) * 9


def test_loss_score_and_metrics_count_real_tokens_alone() -> None:
    made = Tokens(3, {})
    expected = torch.nn.functional.cross_entropy(outputs(ANSWERS)[0, :, :2].T, TARGETS[0, :2])
    torch.testing.assert_close(made.loss(outputs(ANSWERS), TARGETS)[0], expected)
    assert made.score(outputs(ANSWERS), TARGETS).tolist() == [0.5, 1.0]
    metrics = made.metrics()
    metrics.update(outputs(ANSWERS), TARGETS)
    metrics.update(outputs(ANSWERS[:, :2]), TARGETS[:, :2])  # a shorter batch
    assert float(metrics.compute()["token_accuracy"]) == pytest.approx(4 / 6)
    assert made.headline in metrics


def test_more_padding_changes_nothing() -> None:
    made, pad = Tokens(3, {}), torch.nn.functional.pad
    longer = outputs(pad(ANSWERS, (0, 4))), pad(TARGETS, (0, 4), value=-100)
    assert torch.equal(made.loss(*longer), made.loss(outputs(ANSWERS), TARGETS))
    assert torch.equal(made.score(*longer), made.score(outputs(ANSWERS), TARGETS))


def test_decisions_have_one_shape_and_agree_by_the_tokens_that_are_there() -> None:
    made = Tokens(3, {"max_length": 5})
    decided = made.decide(outputs(ANSWERS))
    assert decided.tolist() == [[1, 2, 3, 0, 0], [2, 1, 1, 0, 0]]
    changed = ANSWERS.clone()
    changed[0, 2] = 0
    assert made.agree(decided, made.decide(outputs(changed))).tolist() == pytest.approx([2 / 3, 1])
    with pytest.raises(DataError, match="a text has 6 tokens") as caught:
        made.decide(torch.zeros(2, 3, 6))
    assert "--task.args.max_length 6" in caught.value.hint


def test_what_is_no_class_of_a_token_is_refused() -> None:
    made = Tokens(3, {})
    made.check_targets(TARGETS)
    for wrong in (TARGETS[:, 0], TARGETS.float(), torch.tensor([[3, -100]])):
        with pytest.raises(DataError):
            made.check_targets(wrong)
    made.check_outputs(outputs(ANSWERS))
    with pytest.raises(DataError, match=r"\[2, 3, S\]"):
        made.check_outputs(torch.zeros(2, 7, 3))


def test_tokens_that_are_all_ignored_give_0() -> None:
    task = Tokens(2, {})
    metrics = task.metrics()
    metrics.update(torch.zeros(1, 2, 3), torch.full((1, 3), -100))
    assert {float(value) for value in metrics.compute().values()} == {0.0}, "results.json holds no NaN"
