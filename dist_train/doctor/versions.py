"""Checks the versions of the libraries, and which of them do not go together."""

from __future__ import annotations

import importlib
import platform
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version

from dist_train.doctor.base import Line, Subject, bad, good
from dist_train.errors import first_line

_NEEDED = ("torch", "torchvision", "accelerate", "wandb", "pydantic", "safetensors", "torchmetrics")
# Library -> extra of dist-train that installs it.
_OPTIONAL = {
    "torchao": "pt2e",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "executorch": "executorch",
    "tensorboard": "tensorboard",
    "timm": "timm",
    "transformers": "hf",
    "datasets": "hf",
    "scikit-learn": "quickstart",
}
_LEAST_PYTHON = (3, 10)


def check(subject: Subject) -> Iterator[Line]:
    said = f"python {platform.python_version()}, {platform.platform()}"
    old = sys.version_info[:2] < _LEAST_PYTHON
    yield bad(said, "python 3.10 or newer") if old else good(said)
    installed = installed_versions((*_NEEDED, *_OPTIONAL))
    present = [name for name in _NEEDED if name in installed]
    yield good(", ".join(f"{name} {installed[name]}" for name in present) or "no library is installed")
    for name in _NEEDED:
        if name not in installed:
            yield bad(f"{name} is not installed", f"pip install {name}")
    optional = [f"{name} {installed[name]}" for name in _OPTIONAL if name in installed]
    missing = [name for name in _OPTIONAL if name not in installed]
    if optional:
        yield good(f"optional: {', '.join(optional)}")
    if missing:
        extras = ",".join(dict.fromkeys(_OPTIONAL[name] for name in missing))
        yield good(f"optional, not installed: {', '.join(missing)} (pip install 'dist-train[{extras}]')")
    declared = {name: requires(name) or [] for name in installed}
    declared["dist-train"] = _own_requirements()
    for owner, requirement, found in unmet(declared, installed):
        yield bad(f"{owner} needs {requirement}, and {found} is installed", f"pip install '{requirement}'")
    if {"torch", "torchvision"} <= installed.keys():
        yield from _operators_of_torchvision(installed)


def installed_versions(names: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _own_requirements() -> list[str]:
    """Returns the requirements of dist-train; [] for a checkout that was not installed."""
    try:
        return requires("dist-train") or []
    except PackageNotFoundError:
        return []


def unmet(declared: Mapping[str, list[str]], installed: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yields (owner, requirement, installed version) for each requirement that an installed package does not meet.

    Args:
        declared: the requirements of each package, from its metadata; of extras, only dist-train's count.
    """
    from packaging.requirements import Requirement

    for owner, texts in declared.items():
        seen = set()
        requirements = [Requirement(text) for text in texts]
        always = {each.name.lower() for each in requirements if "extra" not in str(each.marker)}
        for requirement in requirements:
            name = requirement.name.lower()
            marker = requirement.marker
            in_extra = "extra" in str(marker)
            # An extra that narrows what is always needed, as `pt2e` does, is checked by who needs it.
            if in_extra and (owner != "dist-train" or name in always):
                continue
            if marker is not None and not in_extra and not marker.evaluate():
                continue
            if name in installed and not requirement.specifier.contains(installed[name], prereleases=True):
                said = f"{name}{requirement.specifier}"
                if said not in seen:
                    seen.add(said)
                    yield owner, said, installed[name]


def _operators_of_torchvision(installed: Mapping[str, str]) -> Iterator[Line]:
    """Calls an operator of torchvision: one compiled for another torch fails (PyPI's torchvision with a CPU torch)."""
    import torch

    pair = f"torch {installed['torch']} and torchvision {installed['torchvision']}"
    try:
        importlib.import_module("torchvision")
        boxes, scores = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1)
        torch.ops.torchvision.nms(boxes, scores, 0.5)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        yield bad(
            f"{pair} do not go together: {first_line(error)}",
            "pip install --upgrade torch torchvision, both from one index",
        )
        return
    yield good(f"{pair} go together")
