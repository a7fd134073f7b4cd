"""The public API of dist_train: distributed training in PyTorch, from float to a verified int8 artifact."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_train.artifact.load import load_artifact
    from dist_train.config.base import Settings
    from dist_train.config.data import DataConfig
    from dist_train.config.load import load_config
    from dist_train.config.tree import Config
    from dist_train.data.arrays import ImageArrays
    from dist_train.data.sampler import ElasticDistributedSampler
    from dist_train.data.splits import Splits
    from dist_train.errors import ConfigError, CorruptSampleError, DistTrainError
    from dist_train.pipeline.run import run
    from dist_train.registry import (
        register_dataset,
        register_model,
        register_optimizer,
        register_quantization_backend,
        register_schedule,
        register_stage,
        register_strategy,
        register_task,
        register_tracker,
    )
    from dist_train.stages.base import Stage
    from dist_train.strategies.base import Strategy
    from dist_train.tasks import Task
    from dist_train.trackers.base import Tracker

    __version__: str

__all__ = [
    "Config",
    "ConfigError",
    "CorruptSampleError",
    "DataConfig",
    "DistTrainError",
    "ElasticDistributedSampler",
    "ImageArrays",
    "Settings",
    "Splits",
    "Stage",
    "Strategy",
    "Task",
    "Tracker",
    "__version__",
    "load_artifact",
    "load_config",
    "register_dataset",
    "register_model",
    "register_optimizer",
    "register_quantization_backend",
    "register_schedule",
    "register_stage",
    "register_strategy",
    "register_task",
    "register_tracker",
    "run",
]

# Imported when first used (PEP 562): importing the package must not import torch.
_HOME = {
    "Config": "config.tree",
    "ConfigError": "errors",
    "CorruptSampleError": "errors",
    "DataConfig": "config.data",
    "DistTrainError": "errors",
    "ElasticDistributedSampler": "data.sampler",
    "ImageArrays": "data.arrays",
    "Settings": "config.base",
    "Splits": "data.splits",
    "Stage": "stages.base",
    "Strategy": "strategies.base",
    "Task": "tasks",
    "Tracker": "trackers.base",
    "load_artifact": "artifact.load",
    "load_config": "config.load",
    "run": "pipeline.run",
} | {name: "registry" for name in __all__ if name.startswith("register_")}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOME:
        value = getattr(importlib.import_module(f"dist_train.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module 'dist_train' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("dist-train")
    except PackageNotFoundError:  # a checkout that was not installed
        return "0+unknown"
