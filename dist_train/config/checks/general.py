"""All checks of settings that contradict each other or this machine. Starts without importing torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from functools import partial
from itertools import pairwise

from dist_train import registry
from dist_train.cluster.rank_plan import rank_problems
from dist_train.config.checks.accelerate_fsdp import as_launched
from dist_train.config.checks.base import Checks, about
from dist_train.config.checks.data import DATA_CHECKS
from dist_train.config.checks.fit import (
    freeze_problems,
    optim_problems,
    recomputation_problems,
    schedule_problems,
    shard_problems,
)
from dist_train.config.checks.places import PLACE_CHECKS
from dist_train.config.checks.quantization import QUANTIZATION_CHECKS
from dist_train.config.checks.strategy import strategy_problems
from dist_train.config.data import is_weights_file
from dist_train.config.fit import FitConfig
from dist_train.config.tree import Config
from dist_train.errors import Problem

_CHECKS: Checks = [*DATA_CHECKS, *QUANTIZATION_CHECKS, *PLACE_CHECKS]
_about = partial(about, _CHECKS)
_ORDER = ["train", "half", "ptq", "qat", "convert", "export"]


def contradictions(config: Config, environ: Mapping[str, str], bad: AbstractSet[str] = frozenset()) -> list[Problem]:
    """Returns every contradiction within `config`, and with the environment variables of this process.

    Args:
        config: a valid configuration.
        environ: `os.environ`, with the launchers' variables (see `dist_train.cluster.rank_plan`).
        bad: dotted keys of invalid settings, now at their defaults: checks that depend on them are left out.
    """
    return [
        problem
        for keys, check in _CHECKS
        if not any(_touch(key, wrong) for key in keys for wrong in bad)
        for problem in check(config, environ)
    ]


def _touch(key: str, other: str) -> bool:
    return (key + ".").startswith(other + ".") or (other + ".").startswith(key + ".")


@_about()
def _stages_once(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    for name in _duplicates(config.stages):
        yield Problem("stages", f"{name!r} is given twice", hint="each stage runs once: its settings are one section")


@_about()
def _stages_in_order(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    known = [name for name in dict.fromkeys(config.stages) if name in _ORDER]
    for first, second in pairwise(known):
        if _ORDER.index(first) > _ORDER.index(second):
            right = ", ".join(sorted(known, key=_ORDER.index))
            yield Problem("stages", f"{second!r} cannot come after {first!r}", hint=f"the order is [{right}]")


@_about("stages")
def _stages_complete(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    if "convert" in config.stages and not {"ptq", "qat"} & set(config.stages):
        yield Problem("stages", "'convert' needs 'ptq' or 'qat' before it", hint="add qat, or ptq for no training")


@_about("stages", "model")
def _something_to_quantize(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    """Checks that ptq, which does not train, has trained weights: a registered model starts from random ones."""
    target = registry.models.entry(config.model.name).target
    # Hugging Face's models come with their weights.
    ours = isinstance(target, str) and target.startswith("dist_train.") and not config.model.name.startswith("hf/")
    given = config.model.weights or config.model.init_from or config.model.args
    if config.stages[0] == "ptq" and "qat" not in config.stages and ours and not given:
        hint = "put train first, or give trained ones: --model.weights FILE_OR_NAME, --model.init_from RUN_DIR"
        yield Problem("stages", f"'ptq' would quantize {config.model.name!r} with random weights", hint=hint)


@_about("model.weights", "model.weights_key", "model.init_from")
def _weights(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    weights, other = config.model.weights, config.model.init_from
    if weights is not None and other is not None:
        message = "model.weights and model.init_from both say what to start from"
        yield Problem("model.init_from", message, hint="remove one of them: --model.weights null")
    if config.model.weights_key is not None and not (weights is not None and is_weights_file(weights)):
        message = "names a part of a file, but model.weights is none"
        yield Problem("model.weights_key", message, hint="--model.weights FILE, or --model.weights_key null")
    if other is not None and other.resolve() == config.run_dir.resolve():
        message = f"{other} is the directory of this run itself"
        yield Problem("model.init_from", message, hint="--run.name NEW, or the directory of another run")


@_about("train.extend_from", "stages")
def _extension(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    source = config.train.extend_from
    if source is None:
        return
    if "train" not in config.stages:
        yield Problem("train.extend_from", "needs the stage 'train'", hint="add train to the stages, or remove it")
    if source.resolve() == config.run_dir.resolve():
        message = f"{source} is the directory of this run itself"
        yield Problem("train.extend_from", message, hint="--run.name NEW, or the directory of another run")


@_about("data.name")
def _dataset_installed(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    return _installed("data.name", registry.datasets, config.data.name)


@_about("model.name")
def _model_installed(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    return _installed("model.name", registry.models, config.model.name)


@_about("task.name")
def _task_installed(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    return _installed("task.name", registry.tasks, config.task.name)


@_about("strategy")
def _strategy_installed(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    if config.strategy != "auto":
        yield from _installed("strategy", registry.strategies, config.strategy)


@_about("qat.backend", "stages")
def _backend_installed(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    if config.quantizes:
        yield from _installed("qat.backend", registry.quantization_backends, config.qat.backend)


@_about("stages")
def _stages_installed(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    for name in dict.fromkeys(config.stages):
        yield from _installed("stages", registry.stages, name)


@_about("stages", "convert.runtime", "qat.backend")
def _runtime(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    runtime = config.convert.runtime
    if "convert" not in config.stages or runtime not in ("openvino", "onnxruntime"):
        return
    if config.qat.backend in ("fx", "eager"):
        message = f"{runtime!r} cannot run the TorchScript of the backend {config.qat.backend!r}"
        yield Problem("convert.runtime", message, hint="--convert.runtime auto, or --qat.backend pt2e")
    format = "onnx" if runtime == "onnxruntime" else runtime
    yield from _installed("convert.runtime", registry.export_formats, format)


@_about("stages", "export.models", "export.formats", "export.size_bound", "qat.backend", "qat.rules", "half.dtype")
def _exports(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    if "export" not in config.stages:
        return
    if config.export.models is None and {"ptq", "qat"} & set(config.stages) and "convert" not in config.stages:
        hint = "add convert, or say that the float model is meant: --export.models '[fp32]'"
        yield Problem("stages", "'export' without 'convert' would not export the quantized model", hint=hint)
    needed = {"half": "half", "int8": "convert"}
    for name in config.export.models or ():
        stage = needed.get(name)
        if stage is not None and stage not in config.stages:
            hint = f"add {stage} to the stages, or leave {name} out of export.models"
            yield Problem("export.models", f"{name!r} needs the stage {stage!r}", hint=hint)
    if config.export.size_bound is not None and "convert" not in config.stages:
        hint = "add convert to the stages, or remove export.size_bound"
        yield Problem("export.size_bound", "bounds the int8 model, which needs the stage 'convert'", hint=hint)
    int8 = "int8" in (config.export.models or ("int8",)) and "convert" in config.stages
    half = "half" in (config.export.models or ([] if int8 else config.stages))
    for format in dict.fromkeys(config.export.formats):
        if format in ("pt2", "auto"):
            continue
        yield from _installed("export.formats", registry.export_formats, format)
        if half and format in ("onnx", "openvino") and config.half.dtype != "fp16":
            message = f"{format!r} cannot be written in bf16, which half.dtype {config.half.dtype!r} is or may be"
            yield Problem("export.formats", message, hint="--half.dtype fp16, or --export.models '[fp32]'")
        if int8 and config.qat.backend in ("fx", "eager"):
            message = f"{format!r} cannot be written from the TorchScript of the backend {config.qat.backend!r}"
            later = f"dist-train export RUN_DIR --format {format} --model fp32"
            hint = f"--qat.backend pt2e, or later, from the float model: {later}"
            yield Problem("export.formats", message, hint=hint)
        elif int8 and config.qat.simulated_bits:
            message = f"{format!r} cannot be written: qat.rules ask for fewer than 8 bits, which are only simulated"
            hint = "--export.formats '[pt2]', or --export.models '[fp32]', or 8 bits in qat.rules"
            yield Problem("export.formats", message, hint=hint)


@_about("stages", "export.input", "qat.backend")
def _export_input(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    stages, backend = {"export", "convert"}, config.qat.backend
    if config.export.input == "uint8" and stages <= set(config.stages) and backend in ("fx", "eager"):
        message = f"'uint8' puts normalization into the program, and TorchScript of the backend {backend!r} is closed"
        yield Problem("export.input", message, hint="--qat.backend pt2e, or --export.input float")


@_about()
def _trackers(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    for name in dict.fromkeys(config.trackers):
        yield from _installed("trackers", registry.trackers, name)
    for name in _duplicates(config.trackers):
        yield Problem("trackers", f"{name!r} is given twice", hint="it would log everything twice: remove one")


@_about("strategy")
def _strategy(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    return strategy_problems(config, environ)


@_about("sync_batchnorm", "strategy", "stages")
def _sync_batchnorm(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    if not config.sync_batchnorm:
        return
    if config.strategy == "dp":
        message = "strategy dp (nn.DataParallel) cannot synchronise BatchNorm: its replicas are threads of one process"
        yield Problem("sync_batchnorm", message, hint="--strategy ddp, with a process for each GPU")
    if "train" not in config.stages:
        hint = "leave it out: qat takes BatchNorm's statistics from all ranks anyway"
        yield Problem("sync_batchnorm", "is for the stage 'train', which is not in stages", hint=hint)


@_about()
def _ranks(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    return iter(rank_problems(environ))


@_about("profile")
def _profile_increases(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    if config.profile is not None and config.profile.steps[0] >= config.profile.steps[1]:
        first, last = config.profile.steps
        message = f"[{first}, {last}) holds no step: the first must be less than the last"
        yield Problem("profile.steps", message, hint=f"--profile.steps '[{last}, {max(first, last + 1)}]'")


def _check_fit(section: str) -> None:
    """Adds the checks of a section that trains."""

    names = ("name", "momentum", "nesterov", "betas", "eps", "args", "groups")

    @_about(*(f"{section}.optim.{name}" for name in names))
    def optim(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
        return optim_problems(section, _fit(config, section))

    # Apart, so that a wrong stage does not hide what is wrong with an optimizer.
    @_about("strategy", "stages", f"{section}.optim.name", f"{section}.optim.groups")
    def shards(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
        if as_launched(config, environ).strategy == "fsdp" and section in config.stages:
            yield from shard_problems(section, _fit(config, section))

    @_about(
        *(f"{section}.schedule.{name}" for name in ("name", "final", "step_epochs", "gamma", "args", "every", "metric"))
    )
    def schedule(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
        return schedule_problems(section, _fit(config, section))

    @_about(f"{section}.freeze", f"{section}.unfreeze_at", f"{section}.epochs")
    def freeze(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
        return freeze_problems(section, config)

    @_about(f"{section}.activation_checkpointing", "strategy", "sync_batchnorm", "stages", "qat.backend", "compile")
    def recomputation(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
        return recomputation_problems(section, config)

    @_about(f"{section}.ema_samples", f"{section}.ema_decay")
    def average(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
        settings = _fit(config, section)
        if settings.ema_decay is None and settings.ema_samples != type(settings).model_fields["ema_samples"].default:
            hint = f"remove it, or --{section}.ema_decay 0.999"
            yield Problem(f"{section}.ema_samples", "is ignored without ema_decay", hint=hint)


def _fit(config: Config, section: str) -> FitConfig:
    settings: FitConfig = getattr(config, section)
    return settings


_check_fit("train")
_check_fit("qat")


def _installed(place: str, names: registry.Registry, name: str) -> Iterator[Problem]:
    missing = names.entry(name).missing()
    if missing:
        message = f"{name!r} needs {', '.join(missing)}, which is not installed"
        yield Problem(place, message, hint=names.entry(name).to_install(), here=True)


def _duplicates(names: list[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]
