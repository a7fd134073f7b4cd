"""Contradictions: between settings, with the environment, with what is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_train import registry
from dist_train.config.checks.general import contradictions
from dist_train.config.load import dump
from dist_train.config.tree import Config
from dist_train.registry import Entry


def places(tree: dict[str, Any], environ: dict[str, str] | None = None) -> list[str]:
    found = contradictions(Config.model_validate(tree), environ or {})
    assert all(problem.hint for problem in found), "a contradiction ends with what to type"
    return [problem.place for problem in found]


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({}, []),
        ({"debug": {"fast_dev_run": True}, "precision": "bf16"}, []),
        ({"data": {"global_batch_size": 8, "micro_batch_size": 8}}, []),
        ({"data": {"global_batch_size": 8, "micro_batch_size": 9}}, ["data.micro_batch_size"]),
        ({"data": {"root": "not/there"}}, ["data.root"]),
        ({"data": {"augment": [{"name": "color_jitter"}]}}, ["data.augment"]),
        ({"data": {"augment": [{"name": "color_jitter", "contrast": 0.1}]}}, []),
        ({"sync_batchnorm": True}, []),
        ({"sync_batchnorm": True, "compile": True, "data": {"micro_batch_size": 8}}, []),
        ({"sync_batchnorm": True, "strategy": "dp"}, ["sync_batchnorm"]),
        ({"sync_batchnorm": True, "stages": ["qat"]}, ["sync_batchnorm"]),
        ({"train": {"optim": {"args": {"x": 1}}}}, ["train.optim.args"]),
        ({"train": {"optim": {"name": "SGD", "momentum": 0.5}}}, ["train.optim.momentum"]),
        ({"train": {"optim": {"groups": [{"match": "*"}]}}}, ["train.optim.groups.0"]),
        (
            {"qat": {"schedule": {"name": "OneCycleLR", "final": 0.5, "metric": "top1"}}},
            ["qat.schedule.final", "qat.schedule.metric"],
        ),
        ({"train": {"unfreeze_at": 1, "epochs": 1}}, ["train.unfreeze_at", "train.unfreeze_at"]),
        ({"train": {"freeze": ["a"], "unfreeze_at": 1, "epochs": 2}}, []),
        ({"train": {"activation_checkpointing": "a"}, "sync_batchnorm": True}, ["train.activation_checkpointing"]),
        ({"train": {"activation_checkpointing": "a"}, "compile": True}, ["train.activation_checkpointing"]),
        ({"qat": {"activation_checkpointing": ["a"], "backend": "fx"}}, ["qat.activation_checkpointing"]),
        ({"train": {"ema_samples": 64}, "qat": {"ema_samples": 64, "ema_decay": 0.9}}, ["train.ema_samples"]),
        ({"export": {"input": "uint8"}}, []),
        ({"export": {"input": "uint8"}, "qat": {"backend": "fx"}}, ["export.input"]),
        ({"export": {"input": "uint8"}, "qat": {"backend": "fx"}, "stages": ["train", "export"]}, []),
        ({"trackers": []}, []),
        ({"trackers": ["jsonl", "jsonl"]}, ["trackers"]),
        *(({"stages": stages}, []) for stages in (["train"], ["train", "ptq"], ["train", "qat", "convert", "export"])),
        ({"stages": ["qat", "convert"]}, []),
        ({"stages": ["train", "train"]}, ["stages"]),
        ({"stages": ["ptq", "train"], "model": {"args": {"a": 1}}}, ["stages"]),
        ({"stages": ["train", "qat", "export", "convert"]}, ["stages"]),
        ({"stages": ["train", "convert"]}, ["stages"]),
        ({"stages": ["train", "qat", "export"]}, ["stages"]),
        ({"stages": ["train", "qat", "export"], "export": {"models": ["fp32"]}}, []),
        *(({"stages": stages}, []) for stages in (["train", "export"], ["train", "half", "export"])),
        ({"stages": ["train", "export"], "export": {"models": ["fp32", "half", "int8"]}}, ["export.models"] * 2),
        ({"stages": ["train", "export"], "export": {"size_bound": 0.3}}, ["export.size_bound"]),
        ({"export": {"size_bound": 0.3}}, []),
        ({"convert": {"runtime": "openvino"}, "qat": {"backend": "fx"}}, ["convert.runtime"]),
        ({"stages": ["train"], "convert": {"runtime": "openvino"}, "qat": {"backend": "fx"}}, []),
        *(({"convert": {"runtime": name}}, []) for name in ("auto", "openvino", "onnxruntime", "none")),
        ({"export": {"formats": ["executorch"]}}, []),
        ({"export": {"formats": ["executorch"]}, "qat": {"backend": "fx"}}, ["export.formats"]),
        ({"stages": ["train", "half", "export"], "export": {"formats": ["onnx", "executorch"]}}, ["export.formats"]),
        (
            {"stages": ["train", "half", "export"], "export": {"formats": ["onnx"]}, "half": {"dtype": "fp16"}},
            [],
        ),
        ({"stages": ["train", "export"], "export": {"formats": ["executorch", "onnx"]}}, []),
        ({"stages": ["ptq", "convert"], "model": {"name": "resnet18"}}, ["stages"]),
        ({"stages": ["ptq", "convert"], "model": {"name": "resnet18", "args": {"weights": "DEFAULT"}}}, []),
        ({"stages": ["ptq", "convert"], "model": {"name": "resnet18", "weights": "DEFAULT"}}, []),
        ({"stages": ["ptq", "convert"], "model": {"init_from": "runs/other"}}, []),
        ({"stages": ["ptq", "convert"], "model": {"name": "timm/resnet18"}}, ["stages"]),
        ({"model": {"weights": "a.pt", "init_from": "runs/other"}}, ["model.init_from"]),
        ({"model": {"init_from": "runs/run"}}, ["model.init_from"]),
        ({"train": {"optim": {"nesterov": True}}}, []),
        ({"train": {"optim": {"nesterov": True, "momentum": 0}}}, ["train.optim.nesterov"]),
        ({"train": {"optim": {"name": "adamw", "momentum": 0.9}}}, []),
        ({"train": {"optim": {"name": "adamw", "momentum": 0.8}}}, ["train.optim.momentum"]),
        ({"qat": {"optim": {"name": "adamw", "nesterov": True}}}, ["qat.optim.nesterov"]),
        ({"qat": {"optim": {"betas": [0.8, 0.9], "eps": 1e-3}}}, ["qat.optim.betas", "qat.optim.eps"]),
        ({"train": {"schedule": {"name": "step", "gamma": 0.5, "step_epochs": 2}}}, []),
        ({"train": {"schedule": {"name": "step", "final": 0.5}}}, ["train.schedule.final"]),
        ({"train": {"schedule": {"gamma": 0.5}}}, ["train.schedule.gamma"]),
        ({"qat": {"schedule": {"name": "constant", "final": 0.5}}}, ["qat.schedule.final"]),
    ],
)
def test_settings_that_contradict_each_other(tree: dict[str, Any], expected: list[str]) -> None:
    assert places(tree) == expected


def test_a_dumped_configuration_contradicts_itself_no_more_than_the_original(tmp_path: Path) -> None:
    import yaml

    config = Config.model_validate({"train": {"optim": {"name": "adamw"}, "schedule": {"name": "constant"}}})
    assert places(yaml.safe_load(dump(config))) == places(config.model_dump(exclude_unset=True)) == []


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, []),
        ({"RANK": "0", "WORLD_SIZE": "1"}, []),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, []),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}, []),
        ({"WORLD_SIZE": "1"}, []),
        ({"RANK": "0"}, ["RANK"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE"]),
        ({"RANK": "2", "WORLD_SIZE": "2"}, ["RANK"]),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, ["RANK"]),
        ({"RANK": "one", "WORLD_SIZE": "two"}, ["RANK", "WORLD_SIZE"]),
        ({"RANK": "", "WORLD_SIZE": "2"}, ["RANK"]),
        ({"RANK": "0", "WORLD_SIZE": "0"}, ["WORLD_SIZE"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, ["LOCAL_RANK"]),
    ],
)
def test_an_environment_that_contradicts_itself(environ: dict[str, str], expected: list[str]) -> None:
    assert places({}, environ) == expected


def test_the_single_strategy_contradicts_several_processes() -> None:
    ranks = {"RANK": "0", "WORLD_SIZE": "2"}
    assert places({"strategy": "single"}, ranks) == ["strategy"]
    assert places({"strategy": "ddp"}, ranks) == places({"strategy": "single"}) == []


@pytest.mark.parametrize(
    ("names", "tree", "place"),
    [
        (registry.datasets, {"data": {"name": "lacking"}}, "data.name"),
        (registry.models, {"model": {"name": "lacking"}}, "model.name"),
        (registry.trackers, {"trackers": ["lacking"]}, "trackers"),
        (registry.strategies, {"strategy": "lacking"}, "strategy"),
        (registry.stages, {"stages": ["train", "lacking"]}, "stages"),
        (registry.quantization_backends, {"qat": {"backend": "lacking"}}, "qat.backend"),
    ],
)
def test_what_needs_a_package_that_is_not_installed(
    names: registry.Registry, tree: dict[str, Any], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = Entry("json:loads", settings=None, requires={"no_such_module_at_all": "no-such-package"})
    monkeypatch.setitem(names._entries, "lacking", entry)
    (problem,) = contradictions(Config.model_validate(tree), {})
    assert problem.place == place
    assert problem.hint == "pip install no-such-package"


def test_a_format_that_needs_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry("json:loads", requires={"no_such_module_at_all": "no-such-package"})
    monkeypatch.setitem(registry.export_formats._entries, "onnx", entry)
    (problem,) = contradictions(Config.model_validate({"export": {"formats": ["pt2", "onnx"]}}), {})
    assert (problem.place, problem.hint) == ("export.formats", "pip install no-such-package")
    assert places({"stages": ["train"], "export": {"formats": ["onnx"]}}) == []


def test_a_backend_that_no_stage_uses_need_not_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry("json:loads", requires={"no_such_module_at_all": "no-such-package"})
    monkeypatch.setitem(registry.quantization_backends._entries, "lacking", entry)
    assert places({"stages": ["train"], "qat": {"backend": "lacking"}}) == []


MUON_IN_A_GROUP = {"name": "adamw", "groups": [{"match": "*.weight", "name": "Muon"}]}
ACCELERATE = {"strategy": "accelerate"}


@pytest.mark.parametrize(
    ("tree", "environ", "expected"),
    [
        ({"strategy": "dp"}, {}, []),
        ({"strategy": "dp"}, {"RANK": "0", "WORLD_SIZE": "2"}, ["strategy"]),
        ({"strategy": "dp", "compile": True}, {}, ["strategy"]),
        (ACCELERATE, {"RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "bf16"}, []),
        ({**ACCELERATE, "precision": "bf16"}, {"ACCELERATE_MIXED_PRECISION": "bf16"}, []),
        ({**ACCELERATE, "precision": "bf16"}, {}, []),
        ({**ACCELERATE, "precision": "auto"}, {"ACCELERATE_MIXED_PRECISION": "fp16"}, []),
        ({**ACCELERATE, "precision": "fp16"}, {"ACCELERATE_MIXED_PRECISION": "bf16"}, ["precision"]),
        ({**ACCELERATE, "precision": "bf16"}, {"ACCELERATE_MIXED_PRECISION": "no"}, ["precision"]),
        (ACCELERATE, {"ACCELERATE_MIXED_PRECISION": "fp8"}, ["precision"]),
        (ACCELERATE, {"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, []),
        (ACCELERATE, {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, ["strategy"]),
        (ACCELERATE, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, ["strategy"]),
        ({**ACCELERATE, "run": {"device": "cuda"}}, {"ACCELERATE_USE_CPU": "true"}, ["run.device"]),
        ({"strategy": "ddp"}, {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "fp8"}, []),
        ({"strategy": "fsdp"}, {"RANK": "0", "WORLD_SIZE": "2"}, []),
        ({"strategy": "fsdp", "compile": True}, {}, ["compile"]),
        ({"strategy": "fsdp", "sync_batchnorm": True}, {}, ["sync_batchnorm"]),
        ({"strategy": "fsdp", "find_unused_parameters": True}, {}, ["find_unused_parameters"]),
        ({"strategy": "fsdp", "train": {"optim": {"name": "Adafactor", "lr": 0.1}}}, {}, ["train.optim.name"]),
        ({"strategy": "fsdp", "train": {"optim": MUON_IN_A_GROUP}}, {}, ["train.optim.groups.0.name"]),
        ({"train": {"optim": MUON_IN_A_GROUP}}, {}, []),
    ],
)
def test_strategies_that_contradict_the_ranks_or_the_accelerate_config(
    tree: dict[str, Any], environ: dict[str, str], expected: list[str]
) -> None:
    assert places(tree, environ) == expected


@pytest.mark.parametrize(
    ("variable", "name", "instead"),
    [
        ("FSDP", "FSDP1", "--strategy fsdp"),
        ("DEEPSPEED", "DeepSpeed", "accelerate launch --multi_gpu"),
        ("MEGATRON_LM", "Megatron-LM", "accelerate launch --multi_gpu"),
    ],
)
def test_sharded_training_by_accelerate_is_refused_by_name_and_says_what_to_take(
    variable: str, name: str, instead: str
) -> None:
    (problem,) = contradictions(Config.model_validate(ACCELERATE), {f"ACCELERATE_USE_{variable}": "true"})
    assert f"asks for {name}" in problem.message
    assert problem.hint.startswith(("choose", "fsdp_version: 2")) and instead in problem.hint


def test_both_precisions_are_named_where_ours_and_accelerates_differ() -> None:
    config = Config.model_validate({**ACCELERATE, "precision": "fp16"})
    (problem,) = contradictions(config, {"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert problem.message == "is fp16, and the accelerate config says mixed_precision: bf16"
    assert problem.hint.startswith("accelerate launch --mixed_precision fp16")
