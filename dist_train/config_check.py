"""Contradictions: settings that are right one by one and wrong together, or wrong on this machine. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from itertools import pairwise
from typing import Any

from dist_train import registry
from dist_train.config import Config
from dist_train.config_data import ColorJitter
from dist_train.config_fit import FitConfig
from dist_train.errors import Problem
from dist_train.ranks import rank_problems, source_of

Check = Callable[[Config, Mapping[str, str]], Iterable[Problem]]
_CHECKS: list[tuple[tuple[str, ...], Check]] = []
_ORDER = ["train", "half", "ptq", "qat", "convert", "export"]


def contradictions(config: Config, environ: Mapping[str, str], bad: AbstractSet[str] = frozenset()) -> list[Problem]:
    """Every contradiction within `config`, and of it with the environment variables of this process.

    Args:
        config: a valid configuration.
        environ: `os.environ`; what launchers set is looked at (see `dist_train.ranks`).
        bad: dotted keys that were given wrongly and stand at their defaults: checks that rest on them are left out.
    """
    return [
        problem
        for keys, check in _CHECKS
        if not any(_touch(key, wrong) for key in keys for wrong in bad)
        for problem in check(config, environ)
    ]


def _touch(key: str, other: str) -> bool:
    return (key + ".").startswith(other + ".") or (other + ".").startswith(key + ".")


def _about(*keys: str) -> Callable[[Check], Check]:
    """Adds a check, with the settings that it rests on."""

    def add(check: Check) -> Check:
        _CHECKS.append((keys, check))
        return check

    return add


@_about("data.micro_batch_size", "data.global_batch_size")
def _micro_batch(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    micro, whole = config.data.micro_batch_size, config.data.global_batch_size
    if micro is not None and micro > whole:
        message = f"{micro} is larger than data.global_batch_size, {whole}, which is that of all ranks together"
        yield Problem(
            "data.micro_batch_size", message, hint="lower it, or leave it out: a rank then takes its whole share"
        )


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
    if "export" in config.stages and "convert" not in config.stages:
        yield Problem("stages", "'export' needs 'convert' before it", hint="add convert, or leave export out")


@_about("stages", "model")
def _something_to_quantize(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    """PTQ does not train; a model of ours or torchvision's without arguments starts from random weights."""
    target = registry.models.entry(config.model.name).target
    ours = isinstance(target, str) and target.startswith("dist_train.")
    if config.stages[0] == "ptq" and "qat" not in config.stages and ours and not config.model.args:
        hint = "put train first, or register a model that brings trained weights"
        yield Problem("stages", f"'ptq' would quantize {config.model.name!r} with random weights", hint=hint)


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
    if {"ptq", "qat", "convert"} & set(config.stages):
        yield from _installed("qat.backend", registry.quantization_backends, config.qat.backend)


@_about("stages")
def _stages_installed(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    for name in dict.fromkeys(config.stages):
        yield from _installed("stages", registry.stages, name)


@_about()
def _trackers(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    for name in dict.fromkeys(config.trackers):
        yield from _installed("trackers", registry.trackers, name)
    for name in _duplicates(config.trackers):
        yield Problem("trackers", f"{name!r} is given twice", hint="it would log everything twice: remove one")


@_about("strategy")
def _single_process(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    name = {"torchrun": "WORLD_SIZE", "slurm": "SLURM_STEP_NUM_TASKS", "single": ""}[source_of(environ)]
    world_size = environ.get(name, "1")
    if config.strategy == "single" and world_size.isdecimal() and int(world_size) > 1:
        message = f"'single' is for one process, but this is one of {world_size} ({name})"
        yield Problem("strategy", message, hint="--strategy auto, or start one process: dist-train run CONFIG")


@_about()
def _ranks(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    return iter(rank_problems(environ))


@_about("data.root")
def _root_exists(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    root = config.data.root
    if root is not None and not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        yield Problem("data.root", f"{root} {what}", hint="give the folder that holds the dataset's files")


@_about()
def _jitter_does_something(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    for item in config.data.augment:
        if isinstance(item, ColorJitter) and not (item.brightness or item.contrast or item.saturation):
            message = "color_jitter with brightness, contrast and saturation 0 does nothing"
            yield Problem("data.augment", message, hint="for example {name: color_jitter, brightness: 0.4}")


def _check_fit(section: str) -> None:
    """The checks of a section that trains."""

    @_about(*(f"{section}.optim.{name}" for name in ("name", "momentum", "nesterov", "betas", "eps")))
    def optim(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
        settings = _fit(config, section).optim
        if settings.name == "sgd" and settings.nesterov and settings.momentum == 0:
            yield Problem(
                f"{section}.optim.nesterov", "needs a momentum above 0", hint=f"--{section}.optim.momentum 0.9"
            )
        ignored = ("betas", "eps") if settings.name == "sgd" else ("momentum", "nesterov")
        yield from _ignored(f"{section}.optim", settings, ignored)

    @_about(*(f"{section}.schedule.{name}" for name in ("name", "final", "step_epochs", "gamma")))
    def schedule(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
        settings = _fit(config, section).schedule
        used = {"step": ("step_epochs", "gamma"), "constant": ()}.get(settings.name, ("final",))
        ignored = [name for name in ("final", "step_epochs", "gamma") if name not in used]
        yield from _ignored(f"{section}.schedule", settings, ignored)


def _fit(config: Config, section: str) -> FitConfig:
    settings: FitConfig = getattr(config, section)
    return settings


_check_fit("train")
_check_fit("qat")


def _ignored(section: str, settings: Any, names: Iterable[str]) -> Iterator[Problem]:
    """A changed setting that the chosen name does not use. One at its default is none: dumped configs give them all."""
    for name in names:
        if getattr(settings, name) != type(settings).model_fields[name].default:
            key, hint = f"{section}.{name}", f"remove it, or choose another {section}.name"
            yield Problem(key, f"is ignored by {settings.name!r}", hint=hint)


def _installed(place: str, names: registry.Registry, name: str) -> Iterator[Problem]:
    missing = names.entry(name).missing()
    if missing:
        message = f"{name!r} needs {', '.join(missing)}, which is not installed"
        yield Problem(place, message, hint=f"pip install {' '.join(missing)}")


def _duplicates(names: list[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]
