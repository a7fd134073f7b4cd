"""Tests how `auto` is resolved and explained, by machine and launcher."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dist_train.cluster.instructions import sums_overflow
from dist_train.config.checks.strategy import Precision
from dist_train.config.tree import Config
from dist_train.distributed.world import World
from dist_train.errors import SetupError
from dist_train.pipeline.auto import Facts, choose, look

ALL = {"strategy": "auto", "precision": "auto"}
FIXED = {"run": {"device": "cpu", "threads_per_rank": 1}, "data": {"workers": 0}, "strategy": "ddp"}
ALONE = {**FIXED, "strategy": "single"}
BF16_CPU = Facts(world_size=2, local_world_size=2, cores=2, bf16="AVX-512 BF16")
OLD_CPU = Facts(cores=4, threads=4, workers=4)
OLD_GPU = Facts(device="cuda", cuda_devices=1, cores=8, threads=8, workers=8)
TWO_GPUS = Facts(device="cuda", cuda_devices=2, cores=8, threads=8, workers=8, bf16="bfloat16")
LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "bf16"}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("tree", "facts", "environ", "strategy", "precision", "said"),
    [
        (
            ALL,
            BF16_CPU,
            {},
            "ddp",
            "bf16",
            "auto: strategy ddp (2 ranks), precision bf16 (this CPU has AVX-512 BF16), device cpu (no CUDA), "
            "1 thread per rank (2 cores, 2 ranks), at most 1 data worker per rank (2 cores, 2 ranks)",
        ),
        (
            ALL,
            OLD_CPU,
            {},
            "single",
            "fp32",
            "auto: strategy single (1 rank), precision fp32 (this CPU would emulate bf16 and fp16), "
            "device cpu (no CUDA), 4 threads per rank (4 cores, 1 rank), "
            "at most 4 data workers per rank (4 cores, 1 rank)",
        ),
        (
            {**ALONE, "precision": "auto"},
            OLD_GPU,
            {},
            "single",
            "fp16",
            "auto: precision fp16 (this GPU has no bfloat16)",
        ),
        (
            {**ALONE, "precision": "auto"},
            TWO_GPUS,
            {},
            "single",
            "bf16",
            "auto: precision bf16 (this GPU has bfloat16)",
        ),
        (FIXED, OLD_CPU, {}, "single", "fp32", "strategy ddp runs as single: 1 rank"),
        ({**FIXED, "strategy": "fsdp"}, OLD_CPU, {}, "single", "fp32", "strategy fsdp runs as single: 1 rank"),
        ({**FIXED, "strategy": "dp"}, TWO_GPUS, {}, "dp", "fp32", ""),
        (
            {**FIXED, "strategy": "dp"},
            OLD_GPU,
            {},
            "single",
            "fp32",
            "strategy dp runs as single: dp needs two CUDA devices, and this process sees 1 CUDA device",
        ),
        (
            {**FIXED, "strategy": "dp"},
            OLD_CPU,
            {},
            "single",
            "fp32",
            "strategy dp runs as single: dp needs two CUDA devices, and this process runs on the CPU",
        ),
        ({**FIXED, "strategy": "accelerate"}, BF16_CPU, {}, "accelerate", "fp32", ""),
        ({**FIXED, "strategy": "accelerate", "precision": "bf16"}, OLD_CPU, {}, "accelerate", "bf16", ""),
        (
            {**FIXED, "strategy": "accelerate"},
            BF16_CPU,
            LAUNCHED,
            "accelerate",
            "bf16",
            "precision bf16: accelerate's mixed_precision",
        ),
        (
            {**FIXED, "strategy": "accelerate", "precision": "auto"},
            BF16_CPU,
            {"ACCELERATE_MIXED_PRECISION": "no"},
            "accelerate",
            "fp32",
            "auto: precision fp32 (accelerate's mixed_precision)",
        ),
        (
            {**FIXED, "strategy": "accelerate"},
            BF16_CPU,
            LAUNCHED | FSDP2,
            "fsdp",
            "bf16",
            "strategy accelerate runs as fsdp: FSDP2 in the accelerate config, with fsdp.wrap auto\n"
            "precision bf16: accelerate's mixed_precision",
        ),
        (
            {**FIXED, "strategy": "accelerate"},
            OLD_CPU,
            FSDP2,
            "single",
            "fp32",
            "strategy accelerate runs as single: 1 rank",
        ),
        (
            FIXED,
            BF16_CPU,
            LAUNCHED,
            "ddp",
            "fp32",
            "accelerate's mixed_precision bf16 is not used: --strategy accelerate would use it",
        ),
        (FIXED, BF16_CPU, FSDP2, "ddp", "fp32", "accelerate's FSDP is not used: --strategy accelerate would use it"),
        ({**FIXED, "strategy": "fsdp"}, BF16_CPU, FSDP2, "fsdp", "fp32", ""),
    ],
)
def test_what_is_chosen_and_why(
    tree: dict[str, Any], facts: Facts, environ: dict[str, str], strategy: str, precision: Precision, said: str
) -> None:
    choices = choose(Config.model_validate(tree), facts, environ)
    assert (choices.strategy, choices.precision, "\n".join(choices.lines)) == (strategy, precision, said)


def test_a_resumed_run_keeps_the_precision_of_its_first_start_on_another_machine() -> None:
    choices = choose(Config.model_validate({**ALONE, "precision": "auto"}), OLD_CPU, {}, kept="bf16")
    assert choices.precision == "bf16" and choices.lines == ("auto: precision bf16 (as at the first start)",)


def test_a_resumed_run_whose_accelerate_config_changed_is_refused() -> None:
    config = Config.model_validate({"strategy": "accelerate"})
    with pytest.raises(
        SetupError, match=r"began in fp32, but the accelerate config now says bf16\n.*--mixed_precision no"
    ):
        choose(config, BF16_CPU, LAUNCHED, kept="fp32")
    assert choose(config, BF16_CPU, LAUNCHED, kept="bf16").precision == "bf16"
    assert choose(config, BF16_CPU, {}, kept="bf16").precision == "bf16", "evaluated later, without accelerate launch"


def test_an_accelerate_config_for_cpus_is_refused_on_gpus() -> None:
    config = Config.model_validate({"strategy": "accelerate"})
    with pytest.raises(SetupError, match=r"use_cpu: true, and these ranks run on cuda\n.*--run.device cpu"):
        choose(config, replace(TWO_GPUS, world_size=2), FSDP2 | {"ACCELERATE_USE_CPU": "true"})


def test_a_run_to_int8_keeps_to_127_steps_where_a_rank_s_cpu_would_overflow() -> None:
    wide, narrow = Facts(), Facts(sums_overflow=True)
    config = Config.model_validate({**ALONE, "data": {"workers": 0, "name": "digits"}})
    chosen = choose(config, narrow, {})
    assert chosen.engine == "x86"
    assert chosen.lines == ("auto: qat.engine x86 (a CPU without VNNI: 127 steps keep sums in 16 bits)",)
    assert (choose(config, wide, {}).engine, choose(config, wide, {}).lines) == ("auto", ())
    kept = choose(config, wide, {}, kept_engine="x86")
    assert kept.engine == "x86" and kept.lines == ("auto: qat.engine x86 (as at the first start)",)
    assert choose(config, narrow, {}, kept_engine="auto").engine == "auto", "begun where it had 255 steps"
    for settings in ({"engine": "onednn"}, {"backend": "fx"}):
        other = Config.model_validate({**ALONE, "qat": settings})
        assert choose(other, narrow, {}).engine == settings.get("engine", "auto")
    alone = Config.model_validate({**ALONE, "stages": ["train"]})
    assert choose(alone, narrow, {}).engine == "auto", "nothing is converted"


def test_the_facts_of_this_machine_are_those_that_torch_gives() -> None:
    import torch

    facts = look(World(), threads=3, threads_kept=True)
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert bool(facts.bf16) == native and facts.threads == 3 and facts.threads_kept
    assert facts.sums_overflow == sums_overflow()
    assert facts.cores == facts.workers >= 1 and facts.device == "cpu"
