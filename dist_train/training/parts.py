"""Parts of a model that a stage's settings name: what is frozen, and parameters with settings of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from dist_train.config.checks.fit import freeze_of, recomputed
from dist_train.config.fit import FitConfig, OptimConfig
from dist_train.config.tree import Config, SizeMatch
from dist_train.errors import ConfigError, Problem, QuantizationError
from dist_train.quantization.prepared import PreparedModel
from dist_train.training.names import Names, around

_SHOWN = 3
_OF_MATRICES = "Muon"


@dataclass(frozen=True)
class Parts:
    """Names in the float model; a parameter with several names is there under all of them.

    Attributes:
        frozen: parameters that do not learn.
        batch_norms: batch norms whose statistics stay.
        groups: the parameters of each of `optim.groups`: those that no earlier group has.
        recomputed: modules that backward computes anew, none inside another.
        blocks: modules that `strategy: fsdp` shards each by itself, the inner ones first.
    """

    frozen: frozenset[str] = frozenset()
    batch_norms: frozenset[str] = frozenset()
    groups: tuple[frozenset[str], ...] = ()
    recomputed: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """True where something of parameters is named."""
        return bool(self.frozen or self.batch_norms or self.groups)


def check_parts(config: Config, model: nn.Module) -> None:
    """Resolves the patterns of all stages that train.

    Raises:
        ConfigError: lists all patterns that match nothing or change nothing, and stages that would train nothing.
    """
    problems = list[Problem]()
    for stage in config.stages:
        if isinstance(getattr(config, stage, None), FitConfig):
            try:
                resolve_parts(config, stage, model)
            except ConfigError as error:
                problems += [each for each in error.problems if each not in problems]
    if problems:
        raise ConfigError(problems)


def resolve_parts(config: Config, stage: str, model: nn.Module) -> Parts:
    """Resolves a stage's patterns on the float model, before any of its parameters is frozen.

    Patterns are those of fnmatch, as in `qat.rules`, of the names of parameters and of the modules around them.

    Raises:
        ConfigError: lists all mistakes.
    """
    names = Names(model)
    settings: FitConfig = getattr(config, stage)
    patterns, inherited = freeze_of(config, stage), settings.freeze is None
    of = "train" if inherited else stage
    problems, frozen, held = list[Problem](), set[str](), set[str]()
    for number, pattern in enumerate(patterns):
        parameters, modules = names.matched(pattern)
        if not parameters and not modules:
            problems.append(names.unknown(f"{of}.freeze.{number}", pattern, "parameter or module"))
        frozen |= parameters
        held |= modules
    trained = names.trained - frozen
    if patterns and not trained and not problems:
        message = f"freezes all {len(names.trained)} parameters of the model: nothing is left to learn"
        problems.append(Problem(f"{of}.freeze", message, hint="leave the head out"))
    batch_norms = frozenset(name for name in names.batch_norms if name in held or names.all_frozen(name, frozen))
    learning = names.trained if settings.unfreeze_at is not None else trained
    groups = tuple(_groups(names, settings.optim, f"{stage}.optim", learning, problems))
    problems += _no_matrices(names, settings.optim, f"{stage}.optim", learning, groups)
    outermost = _recomputed(names, settings, stage, problems)
    blocks = _blocks(names, config, problems) if config.strategy == "fsdp" else ()
    if problems:
        raise ConfigError(problems)
    return Parts(frozenset(frozen), batch_norms, groups, outermost, blocks)


def _blocks(names: Names, config: Config, problems: list[Problem]) -> tuple[str, ...]:
    """Returns the modules to shard each by itself, the inner ones first, as fully_shard wants them."""
    instead = "--strategy ddp"
    for name, parameter in names.parameters.items():
        if parameter.dim() == 0 or not parameter.numel():
            what = "elements" if parameter.dim() else "dimension"
            message = f"fsdp cannot shard {name}, which has no {what}"
            problems.append(Problem("strategy", message, hint=f"give it the shape [1], or {instead}"))
    dtypes = sorted({str(names.parameters[name].dtype) for name in names.trained})
    if len(dtypes) > 1:
        message = f"fsdp shards parameters of one dtype, and the model has {' and '.join(dtypes)}"
        problems.append(Problem("strategy", message, hint=f"model.float(), or {instead}"))
    wrap = config.fsdp.wrap
    if wrap == "auto":
        return _repeated(names)
    if isinstance(wrap, SizeMatch):
        return tuple(name for name in reversed(names.modules) if name and names.exceeds(name, wrap.min_params))
    found = set[str]()
    for number, pattern in enumerate(wrap):
        place = f"fsdp.wrap.{number}"
        matched = names.top(pattern) - {""}
        if not matched:
            problems.append(names.unknown(place, pattern, "module"))
        # Beside others of a pattern like "layers.0.*", modules without parameters, such as dropouts, mean nothing.
        matched = {name for name in matched if any(True for _ in names.modules[name].parameters())} or matched
        for name in sorted(matched):
            reason = names.cannot_be_block(name)
            if reason:
                problems.append(Problem(place, f"{name} cannot be a block: {reason}", hint="leave it out of fsdp.wrap"))
        found |= matched
    return tuple(name for name in reversed(names.modules) if name in found)


def _repeated(names: Names) -> tuple[str, ...]:
    """Returns the outermost modules with children whose class occurs several times, and that can be blocks."""
    inner = {
        name: module
        for name, module in names.modules.items()
        if name and type(module) is not nn.Sequential and any(True for _ in module.children())
        if not names.cannot_be_block(name)
    }
    kinds = Counter(type(module) for module in {id(each): each for each in inner.values()}.values())
    found = {name for name, module in inner.items() if kinds[type(module)] > 1}
    return tuple(name for name in inner if name in found and not found & set(around(name.rpartition(".")[0])))


def _recomputed(names: Names, settings: FitConfig, stage: str, problems: list[Problem]) -> tuple[str, ...]:
    found = set[str]()
    for number, pattern in enumerate(recomputed(settings)):
        place = f"{stage}.activation_checkpointing"
        matched = names.top(pattern) - {""}
        if not matched:
            numbered = isinstance(settings.activation_checkpointing, list)
            problems.append(names.unknown(f"{place}.{number}" if numbered else place, pattern, "module"))
        found |= matched
    return tuple(name for name in names.modules if name in found and not found & set(around(name.rpartition(".")[0])))


def float_names(prepared: PreparedModel, model: nn.Module) -> dict[str, str]:
    """Returns the float model's name of each parameter that learns, by its name in the prepared model.

    Raises:
        QuantizationError: a parameter has no counterpart of its shape.
    """
    found, known = prepared.float_names(), dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in prepared.named_parameters():
        if not parameter.requires_grad:
            continue
        other = known.get(found.get(name, name))
        if other is None or other.shape != parameter.shape:
            raise QuantizationError(
                f"the prepared model's parameter {name} has no counterpart in the float model",
                "leave freeze and optim.groups out of the stage, or use another --qat.backend",
            )
    return found


def _groups(
    names: Names, optim: OptimConfig, place: str, trained: frozenset[str], problems: list[Problem]
) -> Iterator[frozenset[str]]:
    taken = set[str]()
    for number, group in enumerate(optim.groups):
        here = f"{place}.groups.{number}"
        matched = names.matched(group.match)[0]
        own = frozenset(matched - taken)
        taken |= own
        yield own
        if not matched:
            problems.append(names.unknown(f"{here}.match", group.match, "parameter"))
        elif not own:
            hint = "put it before them, or remove it: the first group that matches counts"
            problems.append(Problem(f"{here}.match", "earlier groups match all that it does", hint=hint))
        elif not own & trained:
            hint = "remove it, or freeze less"
            problems.append(Problem(f"{here}.match", f"{_listed(own)} learn nothing: they are frozen", hint=hint))
        elif group.weight_decay and not _decays(names, group.decay_norm_and_bias, optim, own):
            message = f"changes nothing: {_listed(own)} have one dimension, and decay_norm_and_bias is false"
            hint = "decay_norm_and_bias: true in this group, or remove weight_decay"
            problems.append(Problem(f"{here}.weight_decay", message, hint=hint))


def _no_matrices(
    names: Names, optim: OptimConfig, place: str, trained: frozenset[str], groups: Sequence[frozenset[str]]
) -> Iterator[Problem]:
    """Yields the problem of an optimizer for matrices that is to train parameters of other dimensions."""
    own: dict[str, str | None] = dict.fromkeys(trained)
    for group, members in zip(optim.groups, groups, strict=False):
        own |= dict.fromkeys(own.keys() & members, group.name)
    others = [
        name
        for name in names.parameters
        if name in own and (own[name] or optim.name) == _OF_MATRICES and names.parameters[name].dim() != 2
    ]
    if others:
        patterns = ", ".join(f"{{match: {match}, name: adamw, lr: 0.001}}" for match in names.patterns_of(others))
        yield Problem(
            f"{place}.name",
            f"{_OF_MATRICES} takes parameters of two dimensions alone, and {len(others)} have others: "
            f"{_listed(frozenset(others))}",
            hint=f"give them another optimizer, before other groups: {place}.groups: [{patterns}]; or freeze them",
        )


def _decays(names: Names, given: bool | None, optim: OptimConfig, parameters: frozenset[str]) -> bool:
    one_dimensional = optim.decay_norm_and_bias if given is None else given
    return one_dimensional or any(names.parameters[name].dim() > 1 for name in parameters)


def _listed(names: frozenset[str]) -> str:
    first = sorted(names)
    more = f" and {len(first) - _SHOWN} more" if len(first) > _SHOWN else ""
    return ", ".join(first[:_SHOWN]) + more
