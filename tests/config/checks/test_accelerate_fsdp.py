"""Tests how an accelerate config with FSDP2 is read: as settings of `strategy: fsdp`, or refused option by option."""

from __future__ import annotations

from typing import Any

import pytest

from dist_train.config.checks.accelerate_fsdp import as_launched
from dist_train.config.checks.general import contradictions
from dist_train.config.tree import Config

# As accelerate launch 1.15 sets them for a config file with FSDP2.
LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_MIN_NUM_PARAMS": "100000000",
    "FSDP_FORWARD_PREFETCH": "false",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_SYNC_MODULE_STATES": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
}
BY_CLASS = {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block, Head"}
BY_SIZE = {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}


def config(**settings: Any) -> Config:
    return Config.model_validate({"strategy": "accelerate", **settings})


@pytest.mark.parametrize(
    ("environ", "wrap", "reshards"),
    [
        ({}, "auto", True),
        ({"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}, [], True),
        (BY_CLASS, [{"type": "Block"}, {"type": "Head"}], True),
        ({"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}, "auto", True),
        (BY_SIZE, {"min_params": 100000000}, True),
        ({**BY_SIZE, "FSDP_MIN_NUM_PARAMS": "0"}, [], True),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, "auto", False),
        ({"FSDP_BACKWARD_PREFETCH": "BACKWARD_PRE", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}, "auto", True),
    ],
)
def test_options_become_settings_of_fsdp(environ: dict[str, str], wrap: Any, reshards: bool) -> None:
    assert contradictions(config(), LAUNCHED | environ) == []
    found = as_launched(config(), LAUNCHED | environ)
    assert found.strategy == "fsdp"
    assert found.fsdp.model_dump(mode="json") == {"wrap": wrap, "reshard_after_forward": reshards}


def test_our_own_blocks_hold_where_the_accelerate_config_names_none() -> None:
    ours = config(fsdp={"wrap": ["layers.?"], "reshard_after_forward": False})
    assert as_launched(ours, LAUNCHED).fsdp == ours.fsdp
    (problem,) = contradictions(ours, LAUNCHED | BY_CLASS)
    assert (problem.place, problem.hint[:15]) == ("fsdp.wrap", "leave fsdp.wrap")
    assert contradictions(config(fsdp={"wrap": [{"type": "Block"}, {"type": "Head"}]}), LAUNCHED | BY_CLASS) == []


@pytest.mark.parametrize(
    ("variable", "value", "said", "hint"),
    [
        ("FSDP_VERSION", "1", "asks for FSDP1", "fsdp_version: 2 there"),
        ("FSDP_SHARDING_STRATEGY", "HYBRID_SHARD", "fsdp_sharding_strategy: HYBRID_SHARD", "remove it"),
        ("FSDP_RESHARD_AFTER_FORWARD", "FULL_SHARD", "fsdp_reshard_after_forward: FULL_SHARD", "fsdp_reshard_after"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params: true", "fsdp_offload_params: false"),
        ("FSDP_BACKWARD_PREFETCH", "BACKWARD_POST", "fsdp_backward_prefetch: BACKWARD_POST", "remove it"),
        ("FSDP_FORWARD_PREFETCH", "true", "fsdp_forward_prefetch: true", "fsdp_forward_prefetch: false"),
        ("FSDP_USE_ORIG_PARAMS", "false", "fsdp_use_orig_params: false", "remove it"),
        ("FSDP_STATE_DICT_TYPE", "LOCAL_STATE_DICT", "fsdp_state_dict_type: LOCAL", "fsdp_state_dict_type: SHARDED"),
        ("FSDP_IGNORED_MODULES", "head.*", "fsdp_ignored_modules: head.*", "remove it"),
        ("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "true", "checkpointing_offload: true", "fsdp_activation_checkpoint"),
        ("FSDP_AUTO_WRAP_POLICY", "MY_WRAP", "fsdp_auto_wrap_policy: MY_WRAP", "TRANSFORMER_BASED_WRAP, SIZE_BASED"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "asks for a parallelism_config", "choose multi-GPU"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "compiles by torch dynamo", "leave dynamo_config out"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_its_name(variable: str, value: str, said: str, hint: str) -> None:
    (problem,) = contradictions(config(), LAUNCHED | {variable: value})
    assert (problem.place, problem.source) == ("strategy", f"environment: {variable}")
    assert said in problem.message and problem.hint.startswith(hint)


def test_activation_checkpointing_is_refused_with_the_setting_that_is_its_counterpart() -> None:
    (problem,) = contradictions(config(), LAUNCHED | BY_CLASS | {"FSDP_ACTIVATION_CHECKPOINTING": "true"})
    assert "--train.activation_checkpointing '[{type: Block}, {type: Head}]'" in problem.hint


def test_what_fsdp_cannot_train_is_refused_under_such_a_launch_too() -> None:
    settings = config(compile=True, sync_batchnorm=True, train={"optim": {"name": "Adafactor", "lr": 0.1}})
    found = {problem.place for problem in contradictions(settings, LAUNCHED)}
    assert found == {"compile", "sync_batchnorm", "train.optim.name"}


def test_other_strategies_do_not_read_the_accelerate_config() -> None:
    for name in ("ddp", "fsdp", "auto"):
        other = Config.model_validate({"strategy": name})
        environ = LAUNCHED | BY_CLASS | {"FSDP_OFFLOAD_PARAMS": "true"}
        assert contradictions(other, environ) == [] and as_launched(other, environ) is other
