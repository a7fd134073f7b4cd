"""Operators of other libraries that the user trusts: programs may hold them besides torch's own."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping

import torch

from dist_train.errors import ArtifactError, first_line

_trusted: dict[str, str] = {}


def trust_operators(operators: Mapping[str, str]) -> None:
    """Imports the modules that register operators, and lets all programs that this process opens hold them.

    Args:
        operators: the module by the operator's name, as `torchvision::deform_conv2d`.

    Raises:
        ArtifactError: a module cannot be imported, or does not register its operator.
    """
    for operator, module in operators.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ArtifactError(
                f"the module {module}, which is to register the operator {operator}, cannot be imported: "
                f"{first_line(error)}",
                f"pip install what has it; `python -I -c 'import {module}'` must work",
            ) from error
        namespace, _, name = operator.partition("::")
        if not hasattr(getattr(torch.ops, namespace), name):
            raise ArtifactError(
                f"the module {module} does not register the operator {operator}",
                "name the operator as torch.ops does, NAMESPACE::NAME, and the module that registers it",
            )
    _trusted.update(operators)


def is_trusted(operator: str) -> bool:
    return operator in _trusted


def trusted() -> dict[str, str]:
    """Returns the trusted operators and their modules."""
    return dict(_trusted)


def modules_of(program: bytes) -> list[str]:
    """Returns the modules whose trusted operators are named in a program's archive, which is stored uncompressed."""
    named = {
        module
        for operator, module in _trusted.items()
        if re.search(rb"\bops\.%s\.%s\b" % tuple(part.encode() for part in operator.split("::")), program)
    }
    return sorted(named)


def how_to_trust(operator: str) -> str:
    """Returns what to type for a program with this operator."""
    return (
        f"if you trust it: --export.operators '{{\"{operator}\": MODULE}}' in a run, "
        f'load_artifact(..., operators={{"{operator}": "MODULE"}}), or predict --trust {operator}=MODULE'
    )
