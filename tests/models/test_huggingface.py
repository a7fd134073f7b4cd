"""Hugging Face's models by configuration, folder and name, without a network."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_train.config.checks.general import contradictions
from dist_train.config.data import ModelConfig
from dist_train.config.tree import Config
from dist_train.errors import ConfigError, DataError
from dist_train.models.build import build_model, check_model, initial_weights
from dist_train.models.weights import load_weights

needs_transformers = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="only with transformers"),
]
BERT = {
    **{"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"intermediate_size": 32, "max_position_embeddings": 24},
}
VIT = {
    **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    **{"image_size": 16, "patch_size": 8},
}


def build(name: str, outputs: int = 3, channels: int = 3, **args: Any) -> nn.Module:
    config = ModelConfig(name=name, args=args)
    check_model(config)
    return build_model(config, outputs, channels).eval()


def tokens() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_transformers_that_is_not_installed_is_a_mistake_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else object())
    (problem,) = contradictions(Config.model_validate({"model": {"name": "hf/bert"}}), {})
    assert problem.place == "model.name" and problem.hint == "pip install 'dist-train[hf]'"


class TestWithTransformers:
    pytestmark = needs_transformers

    def test_a_head_puts_out_one_tensor_of_the_data_s_width(self) -> None:
        assert build("hf/bert", config=BERT)(**tokens()).shape == (2, 3)
        assert build("hf/bert", config=BERT, head="token")(**tokens()).shape == (2, 3, 7), "classes before tokens"
        images = torch.zeros(2, 1, 16, 16)
        assert build("hf/vit", channels=1, config=VIT, head="image")(images).shape == (2, 3)

    def test_weights_keep_their_names(self) -> None:
        assert "bert.embeddings.word_embeddings.weight" in build("hf/bert", config=BERT).state_dict()

    def test_a_json_file_says_what_a_dict_does(self, tmp_path: Path) -> None:
        (tmp_path / "tiny.json").write_text(json.dumps({**BERT, "model_type": "bert"}))
        made = build("hf/any", config=str(tmp_path / "tiny.json"))
        shapes = [{key: value.shape for key, value in net.state_dict().items()} for net in (made, build("hf/bert", config=BERT))]  # fmt: skip  # noqa: E501
        assert shapes[0] == shapes[1]

    def test_a_folder_with_weights_is_where_training_starts(self, tmp_path: Path) -> None:
        import transformers

        trained = transformers.BertModel(transformers.BertConfig(**BERT))  # without a head
        trained.save_pretrained(tmp_path)
        assert (tmp_path / "model.safetensors").is_file()
        config = ModelConfig(name=f"hf/{tmp_path}")
        model = build_model(config, 3, 1)
        head = model.state_dict()["classifier.weight"].clone()
        found = initial_weights(config)
        assert found is not None
        source, read = found
        assert source == f"pretrained of hf/{tmp_path}"
        (note,) = load_weights(model, read(), source, 3)
        assert note.startswith("new, as it has none: classifier")
        for key, value in trained.state_dict().items():
            assert torch.equal(model.state_dict()[f"bert.{key}"], value), key
        assert torch.equal(model.state_dict()["classifier.weight"], head)
        assert initial_weights(ModelConfig(name=f"hf/{tmp_path}", weights="random")) is None

    def test_a_head_of_another_width_is_new(self, tmp_path: Path) -> None:
        import transformers

        config = transformers.BertConfig(**BERT, num_labels=5)
        transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
        found = initial_weights(ModelConfig(name=f"hf/{tmp_path}"))
        assert found is not None
        notes = load_weights(build(f"hf/{tmp_path}"), found[1](), "there", 3)
        assert notes == ["the head classifier is new: 3 outputs, 5 in there"]

    def test_a_folder_without_weights_starts_untrained(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**BERT, "model_type": "bert"}))
        assert build(f"hf/{tmp_path}")(**tokens()).shape == (2, 3)
        assert initial_weights(ModelConfig(name=f"hf/{tmp_path}")) is None

    def test_wrong_arguments_are_named_with_those_that_are_right(self) -> None:
        with pytest.raises(ConfigError, match="there is no head 'sentence'") as caught:
            build("hf/bert", config=BERT, head="sentence")
        assert "sequence | token | image" in caught.value.problems[0].hint
        with pytest.raises(ConfigError, match="no model type 'birt'") as caught:
            build("hf/birt", config=BERT)
        assert "hf/bert" in caught.value.problems[0].hint
        with pytest.raises(ConfigError, match="there is no attention 'someone/kernels'"):
            build("hf/bert", config=BERT, attention="someone/kernels")

    def test_no_folder_and_no_network_says_what_to_type(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(DataError, match="there is no folder nobody/nothing") as caught:
            build("hf/nobody/nothing")
        assert "hf download nobody/nothing --local-dir nothing" in caught.value.hint

    def test_code_of_a_model_is_never_run(self, tmp_path: Path) -> None:
        settings = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine", "AutoModelForSequenceClassification": "code.Net"}}  # fmt: skip  # noqa: E501
        (tmp_path / "config.json").write_text(json.dumps(settings))
        (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        with pytest.raises(DataError, match="brings code of its own, which is never run"):
            build(f"hf/{tmp_path}")
        assert not (tmp_path / "ran").exists()
