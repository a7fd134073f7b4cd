"""Reads an accelerate config with FSDP2 as the settings of `strategy: fsdp` that it stands for.

accelerate 1.15 itself shards on GPUs alone: on CPUs it trains unsharded, and says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dist_train.config.fit import Match, TypeMatch
from dist_train.config.tree import Config, SizeMatch
from dist_train.config.yaml_text import to_yaml
from dist_train.errors import Problem

_NO = frozenset({"", "0", "f", "false", "n", "no", "none", "off"})
_YES = frozenset({"", "1", "on", "t", "true", "y", "yes"})


@dataclass(frozen=True)
class _Option:
    """An option that is refused beyond some values. `variable`: where accelerate launch puts it, after FSDP_."""

    variable: str
    name: str
    accepted: frozenset[str]
    why: str
    hint: str


_OPTIONS = (
    _Option(
        "SHARDING_STRATEGY",
        "fsdp_sharding_strategy",
        frozenset({"", "1", "full_shard"}),
        "which is FSDP1's; FSDP2 shards over all ranks",
        "remove it; for SHARD_GRAD_OP fsdp_reshard_after_forward: false",
    ),
    _Option(
        "RESHARD_AFTER_FORWARD",
        "fsdp_reshard_after_forward",
        _YES | _NO,
        "which is FSDP1's; FSDP2's is true or false",
        "fsdp_reshard_after_forward: true",
    ),
    _Option(
        "OFFLOAD_PARAMS",
        "fsdp_offload_params",
        _NO,
        "but here a parameter stays on the device that trains it",
        "fsdp_offload_params: false; --train.activation_checkpointing or a smaller --data.micro_batch_size",
    ),
    _Option(
        "BACKWARD_PREFETCH",
        "fsdp_backward_prefetch",
        frozenset({"", "none", "1", "backward_pre"}),
        "but FSDP2 always fetches the next block before a block's backward",
        "remove it",
    ),
    _Option(
        "FORWARD_PREFETCH",
        "fsdp_forward_prefetch",
        _NO,
        "which accelerate has for FSDP1 alone",
        "fsdp_forward_prefetch: false",
    ),
    _Option(
        "USE_ORIG_PARAMS", "fsdp_use_orig_params", _YES, "but FSDP2 always keeps the model's parameters", "remove it"
    ),
    _Option(
        "STATE_DICT_TYPE",
        "fsdp_state_dict_type",
        frozenset({"", "1", "3", "full_state_dict", "sharded_state_dict"}),
        "which FSDP2 does not have",
        "fsdp_state_dict_type: SHARDED_STATE_DICT",
    ),
    _Option(
        "IGNORED_MODULES",
        "fsdp_ignored_modules",
        frozenset({"", "none"}),
        "but here all parameters are in shards",
        "remove it; --train.freeze keeps parameters as they are",
    ),
    _Option(
        "ACTIVATION_CHECKPOINTING_OFFLOAD",
        "fsdp_activation_checkpointing_offload",
        _NO,
        "but here activations stay on the device",
        "fsdp_activation_checkpointing_offload: false",
    ),
)


def asks_for_fsdp(environ: Mapping[str, str]) -> bool:
    """Tells whether accelerate launched this process with an FSDP config, of whatever version."""
    return environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def as_launched(config: Config, environ: Mapping[str, str]) -> Config:
    """Returns the config with `strategy: fsdp`, as an accelerate config with FSDP2 wants it; any other unchanged.

    Options that have no counterpart here are left to `accelerate_fsdp_problems`.
    """
    if config.strategy != "accelerate" or not asks_for_fsdp(environ) or _version(environ) != "2":
        return config
    wrap = _wrap(environ)
    reshards = environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() in _YES
    settings = {
        "wrap": config.fsdp.wrap if wrap is None else wrap,
        "reshard_after_forward": config.fsdp.reshard_after_forward and reshards,
    }
    return config.model_copy(update={"strategy": "fsdp", "fsdp": config.fsdp.model_copy(update=settings)})


def wrapping(config: Config) -> str:
    """Returns the settings of `strategy: fsdp` that an accelerate config changes, as YAML on a line."""
    chosen = to_yaml(config.fsdp.model_dump(mode="json")["wrap"], one_line=True)
    return f"fsdp.wrap {chosen}" + ("" if config.fsdp.reshard_after_forward else ", fsdp.reshard_after_forward false")


def accelerate_fsdp_problems(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    """Yields what of an accelerate config with FSDP is not trained with; nothing if it has none."""
    if not asks_for_fsdp(environ):
        return
    version = _version(environ)
    if version != "2":
        message = f"the accelerate config asks for FSDP{version}, which strategy accelerate does not train with"
        hint = "fsdp_version: 2 there (accelerate to-fsdp2 --config_file FILE --overwrite), or --strategy fsdp"
        yield Problem("strategy", message, "environment: FSDP_VERSION", hint)
        return
    for option in _OPTIONS:
        variable = f"FSDP_{option.variable}"
        value = environ.get(variable, "")
        if value.lower() not in option.accepted:
            message = f"the accelerate config says {option.name}: {value}, {option.why}"
            yield Problem("strategy", message, f"environment: {variable}", f"{option.hint}; or --strategy fsdp")
    yield from _wrap_problems(config, environ)
    if environ.get("FSDP_ACTIVATION_CHECKPOINTING", "").lower() not in _NO:
        named = _wrap(environ)
        patterns = named if isinstance(named, list) and named else ["PATTERN"]
        shown = ", ".join(f"{{type: {each.type}}}" if isinstance(each, TypeMatch) else each for each in patterns)
        message = "the accelerate config says fsdp_activation_checkpointing: true, but here each stage has its own"
        hint = f"fsdp_activation_checkpointing: false there, and --train.activation_checkpointing '[{shown}]' here"
        yield Problem("strategy", message, "environment: FSDP_ACTIVATION_CHECKPOINTING", hint)


def _wrap_problems(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    source = "environment: FSDP_AUTO_WRAP_POLICY"
    policy = _policy(environ)
    if policy not in ("", "NO_WRAP", "SIZE_BASED_WRAP", "TRANSFORMER_BASED_WRAP"):
        message = f"the accelerate config says fsdp_auto_wrap_policy: {policy}, which accelerate does not have"
        hint = "TRANSFORMER_BASED_WRAP, SIZE_BASED_WRAP or NO_WRAP there"
        yield Problem("strategy", message, source, hint)
    wrap = _wrap(environ)
    if wrap is not None and config.fsdp.wrap not in ("auto", wrap):
        message = f"names blocks, and the accelerate config names others: fsdp_auto_wrap_policy: {policy}"
        yield Problem("fsdp.wrap", message, hint="leave fsdp.wrap out here, or fsdp_auto_wrap_policy out there")


def _version(environ: Mapping[str, str]) -> str:
    return environ.get("FSDP_VERSION", "1")


def _policy(environ: Mapping[str, str]) -> str:
    return environ.get("FSDP_AUTO_WRAP_POLICY", "").upper()


def _wrap(environ: Mapping[str, str]) -> SizeMatch | list[Match] | None:
    """Returns the `fsdp.wrap` of an accelerate config; None where it says nothing."""
    policy = _policy(environ)
    if policy == "TRANSFORMER_BASED_WRAP":
        names = [name.strip() for name in environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",")]
        # Without names accelerate takes those that a model of transformers has for itself, and else wraps nothing.
        return [TypeMatch(type=name) for name in names if name] or None
    if policy == "SIZE_BASED_WRAP":
        given = environ.get("FSDP_MIN_NUM_PARAMS", "")
        return SizeMatch(min_params=int(given)) if given.isdecimal() and int(given) else []
    return [] if policy == "NO_WRAP" else None
