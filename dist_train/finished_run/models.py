"""The models of a finished run, in memory on the CPU, as they are deployed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dist_train import trees
from dist_train.artifact.deployable import Deployable, deploy_float, deploy_half, deploy_int8
from dist_train.artifact.pixel_input import PixelInput, pixel_input
from dist_train.finished_run.open import FinishedRun
from dist_train.models.build import build_model
from dist_train.programs.signature import dynamic_of
from dist_train.stages.convert import Converted
from dist_train.tasks import Task
from dist_train.trees import Tree

_PROBE_ROWS = 16


def model_names(run: FinishedRun) -> list[str]:
    """Returns the names of the models that the run has made so far: fp32, bf16 or fp16, int8."""
    names = ["fp32"] if "train" in run.stages else []
    names += [run.half] if run.half is not None else []
    return names + (["int8"] if "convert" in run.stages else [])


def input_of(run: FinishedRun, kept: Mapping[str, Any]) -> PixelInput | None:
    """Returns the input of the run's exported models: that of its artifact, whose manifest `kept` is, if it has one."""
    return pixel_input(run.described, kept["input"]["dtype"] if "input" in kept else run.config.export.input)


def has_drawn_rows(run: FinishedRun) -> bool:
    """True where random numbers are inputs: for one tensor of floats of one size. Others need rows of the data."""
    leaves = run.described.get("inputs") or [{"name": "", "dtype": "float32"}]
    return [leaf["name"] for leaf in leaves] == [""] and leaves[0]["dtype"] == "float32" and not _dynamic(run)


def kept_rows(run: FinishedRun) -> Tree | None:
    """Returns the rows of the data that the conversion was tried with; None for a run that converts nothing."""
    return Converted.of(run.product("convert")).probe["inputs"] if "convert" in run.stages else None


def _dynamic(run: FinishedRun) -> dict[str, dict[int, str]]:
    return dynamic_of(run.described)


def deployable(
    run: FinishedRun,
    name: str,
    float_model: nn.Module | None,
    pixels: PixelInput | None = None,
    real: Tree | None = None,
) -> tuple[Deployable, Tree]:
    """Returns a model and its probe inputs: of the conversion for int8, else drawn, as the data may be missing.

    Args:
        name: one of `model_names`.
        float_model: the result of `trained_model`; needed for float and half.
        pixels: the result of `input_of`; the probe inputs are uint8 images where it is not None.
        real: rows of the data, where not `has_drawn_rows`.

    Raises:
        ArtifactError: torch.export cannot trace the model.
    """
    if name == "int8":
        converted = Converted.of(run.product("convert"))
        bits = run.config.qat.simulated_bits
        names = [leaf for leaf, _ in trees.named_leaves(converted.probe["inputs"])]
        model = deploy_int8(converted.program, converted.probe["outputs"], bits, pixels, names, _dynamic(run))
        return model, model.takes(converted.probe["inputs"])
    assert float_model is not None
    seed = run.config.run.seed
    if not has_drawn_rows(run):
        assert real is not None
        inputs = real
    elif pixels is None:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(_PROBE_ROWS, *run.described["input_shape"], generator=generator)
    else:
        inputs = pixels.normalized(pixels.drawn(_PROBE_ROWS, seed))
    if name == "fp32":
        model = deploy_float(float_model, inputs, pixels, _dynamic(run))
    else:
        model = deploy_half(float_model, name, inputs, pixels, _dynamic(run))
    return model, model.takes(inputs)


def trained_model(run: FinishedRun) -> nn.Module:
    """Builds the float model with the trained weights, in eval mode."""
    settings = run.config.model
    model = build_model(settings, run.described["num_outputs"], _channels(run.described))
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
    run.load_float(model)
    return model


def tell_task(run: FinishedRun, task: Task, float_model: nn.Module | None, real: Tree | None) -> None:
    """Shows the run's model to a task that asks for it (`Task.for_model`).

    Args:
        float_model: the result of `trained_model`; None: one is built, untrained.
        real: rows of the data, where not `has_drawn_rows`.
    """
    if type(task).for_model is Task.for_model:
        return
    settings = run.config.model
    model = float_model or build_model(settings, run.described["num_outputs"], _channels(run.described))
    task.for_model(model.eval(), torch.zeros(2, *run.described["input_shape"]) if real is None else real)


def _channels(described: Mapping[str, Any]) -> int:
    """Returns the channels of the inputs, as `Splits.in_channels`."""
    if described["input_shape"]:
        return int(described["input_shape"][0])
    images = [leaf["shape"] for leaf in described["inputs"] if len(leaf["shape"]) == 4]
    return int(images[0][1] or 1) if images else 1
