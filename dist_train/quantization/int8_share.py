"""Share of a model's weights that became int8: "int8" may mean mostly float, which no gate of decisions shows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from dist_train.config.stages import QATConfig
from dist_train.programs.signature import Dynamic
from dist_train.quantization.backend import build_backend
from dist_train.quantization.dry_run import FAILURES
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.rules import resolve_rules, skipped_modules
from dist_train.trees import Tree

LEAST_SHARE = 0.9
"""Share of the weights below which a user is warned: the model is then not as small and fast as "int8" promises."""
_SHOWN = 3
_ALTERNATIVES = ("pt2e", "fx")  # backends that take any model


@dataclass(frozen=True)
class Int8Share:
    """The weights of a model: every parameter of two or more dimensions; an element of a shared one counts once.

    Biases and the vectors of normalizations have one dimension and are few; they stay in floating point or go into a
    layer's integers. Other parameters of two dimensions, such as position embeddings, count: they are in the file as
    int8 or as float.

    Attributes:
        int8: elements that are converted to integers, of 8 bits or of a rule's width, by the module that holds them.
        left_float: elements that stay in floating point, by module, the largest first.
        embeddings: those of these modules that are embeddings: tables that are read, not multiplied.
    """

    int8: Mapping[str, int]
    left_float: Mapping[str, int]
    embeddings: frozenset[str] = frozenset()

    @property
    def share(self) -> float:
        """The int8 share of all elements; 1 for a model without weights."""
        whole = sum(self.int8.values()) + sum(self.left_float.values())
        return sum(self.int8.values()) / whole if whole else 1.0

    def as_json(self) -> dict[str, Any]:
        """Returns the counts for results.json and the manifest, with the modules in floating point by name."""
        return {
            "share": round(self.share, 6),
            "int8": sum(self.int8.values()),
            "float": sum(self.left_float.values()),
            "int8_modules": len(self.int8),
            "float_modules": dict(self.left_float),
            **({"float_embeddings": sorted(self.embeddings)} if self.embeddings else {}),
        }

    def in_words(self) -> str:
        """`83.1 % of the weights are int8; float: encoder.0 (1,024), head (512) and 3 more`."""
        names = [
            f"{name} ({count:,}{', embedding' if name in self.embeddings else ''})"
            for name, count in list(self.left_float.items())[:_SHOWN]
        ]
        more = len(self.left_float) - len(names)
        left = f"; float: {', '.join(names)}{f' and {more} more' if more else ''}" if names else ""
        return f"{in_percent(self.share)} % of the weights are int8{left}"


def in_percent(share: float) -> str:
    """Formats a share, rounded down, so that 100 means all."""
    return f"{math.floor(share * 1000) / 10:g}"


def int8_share(model: nn.Module, prepared: PreparedModel) -> Int8Share | None:
    """Counts the weights of the float `model` that converting `prepared`, which was made from it, turns into integers.

    None where the prepared model's backend does not tell them.
    """
    found = prepared.integer_weights()
    if found is None:
        return None
    converted = set(found)
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.dim() > 1:
            names[id(parameter)].append(name)
    sizes = {id(parameter): parameter.numel() for parameter in model.parameters()}
    int8, left = defaultdict[str, int](int), defaultdict[str, int](int)
    for key, shared in names.items():
        of_int8 = next((name for name in shared if name in converted), None)
        name = of_int8 or shared[0]
        (left if of_int8 is None else int8)[name.rpartition(".")[0] or name] += sizes[key]
    kinds = (nn.Embedding, nn.EmbeddingBag)
    embeddings = frozenset(name for name, module in model.named_modules() if isinstance(module, kinds)) & left.keys()
    return Int8Share(dict(int8), dict(sorted(left.items(), key=lambda each: -each[1])), embeddings)


def advise(
    model: nn.Module, example: Tree, settings: QATConfig, found: Int8Share, dynamic: Dynamic | None = None
) -> str:
    """Explains why weights stay in floating point: by rules of the config, or because the backend does not take them.

    Other backends are tried, to name one that quantizes more.

    Args:
        model: the float model on the CPU; it is not changed.
        example: as of `QuantizationBackend.prepare`.
    """
    skipped = skipped_modules(resolve_rules(model, settings.rules))
    by_rules = sum(count for name, count in found.left_float.items() if name in skipped)
    parts = [f"qat.rules leave {by_rules:,} of them in floating point"] if by_rules else []
    embedded = sum(found.left_float[name] for name in found.embeddings)
    if embedded:
        parts.append(f"embeddings, {embedded:,} of them, stay in floating point: they are read, not multiplied")
    if embedded == sum(found.left_float.values()):
        return "; ".join(parts)
    shares = {
        name: _share_of(model, example, settings, name, dynamic) for name in _ALTERNATIVES if name != settings.backend
    }
    best = max(shares, key=lambda name: shares[name])
    if shares[best] > found.share + 0.01:
        parts.append(f"--qat.backend {best} quantizes {in_percent(shares[best])} %")
    elif not by_rules:
        parts.append("no other backend quantizes more, so only the quantized part gets smaller and faster")
    return "; ".join([*parts, *_recurrent(model, found)])


def _recurrent(model: nn.Module, found: Int8Share) -> list[str]:
    """Says of the largest recurrent layer in floating point why it is, and what to do."""
    for name in found.left_float:
        layer = model.get_submodule(name) if name in dict(model.named_modules()) else None
        if isinstance(layer, (nn.RNNBase, nn.RNNCellBase)):
            return [
                f"{name}: torch computes nn.{type(layer).__name__} in one operator, without int8 kernels; "
                "a 1-d convolution, attention, or nn.Linear in a loop of the model's own becomes int8"
            ]
    return []


def _share_of(model: nn.Module, example: Tree, settings: QATConfig, backend: str, dynamic: Dynamic | None) -> float:
    """Computes the share of another backend; 0 where it does not take the model."""
    try:
        other = build_backend(settings.model_copy(update={"backend": backend, "engine": "auto"}), dynamic)
        found = int8_share(model, other.prepare(model, example, settings.rules))
    except FAILURES:
        return 0.0
    return found.share if found is not None else 0.0
