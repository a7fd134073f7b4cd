"""Registries of models, datasets, stages, ... by name, without importing torch."""

from dist_train.registry.builtin import (
    datasets,
    export_formats,
    models,
    quantization_backends,
    register_dataset,
    register_model,
    register_quantization_backend,
    register_stage,
    register_strategy,
    register_task,
    register_tracker,
    stages,
    strategies,
    tasks,
    trackers,
)
from dist_train.registry.registry import Entry, Registry, resolve

__all__ = [
    "Entry",
    "Registry",
    "datasets",
    "export_formats",
    "models",
    "quantization_backends",
    "register_dataset",
    "register_model",
    "register_quantization_backend",
    "register_stage",
    "register_strategy",
    "register_task",
    "register_tracker",
    "resolve",
    "stages",
    "strategies",
    "tasks",
    "trackers",
]
