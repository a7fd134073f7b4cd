"""A text model goes the whole way on two ranks: float to int8 to ONNX, killed and resumed with the same bytes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_train
from dist_train.data.text import byte_tokens
from dist_train.run_dir.files import read_json
from dist_train.run_dir.paths import RunDir
from tests.pipeline.test_exactness_integration import assert_same_result, lines
from tests.support.ranks import train, train_done

CONFIG: dict[str, Any] = {
    "run": {"name": "text", "threads_per_rank": 1, "device": "cpu"},
    "data": {
        "name": "languages",
        "args": {"source": "generated", "languages": ["one", "two", "three"], "per_language": 300, "max_length": 16},
        "global_batch_size": 48,
        "workers": 0,
    },
    "model": {"name": "text_transformer", "args": {"width": 16, "depth": 1, "heads": 2, "max_length": 16}},
    "stages": ["train", "qat", "convert", "export"],
    "train": {"epochs": 6, "optim": {"name": "adamw", "lr": 0.01}},
    "qat": {"epochs": 1, "optim": {"name": "adamw", "lr": 0.001}},
    "export": {"formats": ["onnx"], "latency": False},
    "checkpoint": {"every_steps": 10},
    "debug": {"ledger": True},
}


def written(folder: Path, **changes: Any) -> Path:
    (folder / "text.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder / "text.json"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_text_model_is_trained_and_deployed_by_two_ranks_and_resumes_exactly(tmp_path: Path) -> None:
    config, run, killed = written(tmp_path), tmp_path / "run", tmp_path / "killed"
    printed = train_done(2, "run", str(config), "--run.dir", str(run), cold=True)
    assert "weights are int8; float: token" in printed
    results = read_json(RunDir(run).results)
    models = results["models"]
    assert {figures["count"] for figures in models.values()} == {90}
    assert models["fp32"]["top1"] > 0.8 and models["int8"]["top1"] > models["fp32"]["top1"] - 0.05
    assert all(gate["passed"] for gate in results["gates"].values())
    model, manifest = dist_train.load_artifact(run / "export")
    assert manifest["classes"] == ["one", "two", "three"]
    for texts in (["ab"], ["abc", "abcde", "b"]):
        rows = [byte_tokens(text, 16) for text in texts]
        ids = torch.tensor([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])
        assert model({"input_ids": ids, "attention_mask": (ids > 0).long()}).shape == (len(texts), 3)

    with train(2, "run", str(config), "--run.dir", str(killed)) as ranks:
        assert ranks.until(lambda: lines(killed) >= lines(run) / 2), ranks.printed()
        ranks.kill()
    train_done(2, "run", str(config), "--run.dir", str(killed))
    assert_same_result(run, killed)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_losses_of_a_text_model_are_the_same_on_one_and_three_ranks(tmp_path: Path) -> None:
    losses = []
    for world in (1, 3):
        config = written(tmp_path, stages=["train"], train={"epochs": 1, "optim": {"name": "sgd", "lr": 0.05}})
        run = tmp_path / str(world)
        train_done(world, "run", str(config), "--run.dir", str(run), "--log.every_steps", "1")
        found = [json.loads(line) for line in RunDir(run).metrics.read_text().splitlines()]
        losses.append([line["loss"] for line in found if "loss" in line and "step" in line])
    assert len(losses[0]) == len(losses[1]) > 10
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_bert_of_transformers_goes_the_same_way(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="only with transformers")
    settings = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings |= {"intermediate_size": 32, "max_position_embeddings": 16}
    config = written(tmp_path, model={"name": "hf/bert", "args": {"config": settings}})
    run = tmp_path / "run"
    train_done(2, "run", str(config), "--run.dir", str(run))
    results = read_json(RunDir(run).results)
    assert results["models"]["int8"]["top1"] > results["models"]["fp32"]["top1"] - 0.05
    assert all(gate["passed"] for gate in results["gates"].values())


@pytest.mark.long
@pytest.mark.timeout(900)
def test_classes_of_tokens_from_a_dataset_of_hugging_face(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="only with transformers")
    datasets = pytest.importorskip("datasets", reason="only with datasets")
    draw = random.Random(0)

    def rows(count: int) -> Any:
        lines = [["".join(draw.choices("abcxyz", k=draw.randint(1, 4))) for _ in range(3)] for _ in range(count)]
        tags = [["late" if word[0] > "m" else "early" for word in line] for line in lines]
        return datasets.Dataset.from_dict({"words": lines, "tags": tags})

    datasets.DatasetDict({"train": rows(240), "test": rows(40)}).save_to_disk(str(tmp_path / "words"))
    settings = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings |= {"intermediate_size": 32, "max_position_embeddings": 16}
    config = written(
        tmp_path,
        data={
            "name": f"hf/{tmp_path / 'words'}",
            "args": {"text": "words", "label": "tags", "tokenizer": "bytes", "max_length": 16},
            **{"global_batch_size": 24, "workers": 0},
        },
        model={"name": "hf/bert", "args": {"head": "token", "config": settings}},
        task={"name": "tokens", "args": {"max_length": 16}},
    )
    run = tmp_path / "run"
    train_done(2, "run", str(config), "--run.dir", str(run))
    results = read_json(RunDir(run).results)
    assert results["models"]["int8"]["token_accuracy"] > 0.9
    assert all(gate["passed"] for gate in results["gates"].values())
