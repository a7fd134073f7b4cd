"""Deployable models: a run's float, half and int8 models with their programs and their outputs for the probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.export import ExportedProgram

from dist_train import trees
from dist_train.artifact.pixel_input import PixelInput
from dist_train.errors import ArtifactError, first_line
from dist_train.lowering.agreement import Decisions
from dist_train.lowering.base import Reference
from dist_train.models.half_precision import Dtype, HalfModel
from dist_train.programs.program import Program, open_program, tree_call
from dist_train.programs.pt2 import export_program, load_program, program_bytes
from dist_train.programs.signature import Dynamic, plain_outputs
from dist_train.trees import Tree


@dataclass(frozen=True, kw_only=True)
class Deployable(Reference):
    """One model of a run: the reference for runtimes and formats, and the program that is deployed.

    Attributes:
        name: fp32, bf16, fp16 or int8.
        program: the model as bytes.
        outputs: the outputs of the model in memory, before it became a program, for the probe; [rows, ...].
        simulated_bits: widths below 8 that an int8 model simulates, as no kernel computes in them.
        decisions: of an int8 model, for the gates of its formats; None where only rounding is checked.
        pixels: of a model that takes uint8 images and normalizes them itself; None for normalized floats.
        names: of the leaves of the inputs.
    """

    name: str
    program: Program
    outputs: Tree
    simulated_bits: Sequence[int] = ()
    decisions: Decisions | None = None
    pixels: PixelInput | None = None
    names: Sequence[str] = ("",)

    @property
    def usage(self) -> str:
        """Python that runs the program's file by torch alone, as `Written.usage`."""
        return self.program.usage_for(self.names, self.output_names)

    @property
    def output_names(self) -> list[str]:
        """Names of the leaves of the outputs; "" for one tensor."""
        return [name for name, _ in trees.named_leaves(self.outputs)]

    def takes(self, inputs: Tree) -> Tree:
        """Returns the model's own input for `inputs` as the data's loader gives them, on the CPU."""
        return inputs if self.pixels is None else self.pixels.pixels(inputs)


def deploy_float(
    model: nn.Module, probe: Tree, pixels: PixelInput | None = None, dynamic: Dynamic | None = None
) -> Deployable:
    """Exports the float model.

    Args:
        model: on the CPU, in eval mode.
        probe: real rows [rows, ...], such as normalized images.
        pixels: of a model that is to take uint8 images.
        dynamic: dimensions that vary besides the batch.
    """
    return _exported("fp32", model, probe, None, pixels, dynamic)


def deploy_half(
    model: nn.Module,
    dtype: str,
    probe: Tree,
    pixels: PixelInput | None = None,
    dynamic: Dynamic | None = None,
) -> Deployable:
    """Exports the half model of a float one. Arguments as of `deploy_float`; dtype: bf16 or fp16."""
    return _exported(dtype, HalfModel(model, cast(Dtype, dtype)), probe, dtype, pixels, dynamic)


def deploy_int8(
    program: Program,
    outputs: Tree,
    simulated_bits: Sequence[int] = (),
    pixels: PixelInput | None = None,
    names: Sequence[str] = ("",),
    dynamic: Dynamic | None = None,
) -> Deployable:
    """Opens an int8 program.

    Args:
        program: the serialized result of `convert`.
        outputs: the outputs of the converted model in memory for the probe.
        pixels: of a model that is to take uint8 images.
        names: of the leaves of its inputs.
        dynamic: dimensions that vary besides the batch.

    Raises:
        ArtifactError: `pixels` is given, and the program is TorchScript.
    """
    exported = load_program(program.data) if program.lowers else None
    if pixels is not None:
        if exported is None:
            raise ArtifactError("TorchScript cannot take uint8 images", "--export.input float, or --qat.backend pt2e")
        exported = export_module(pixels.before(exported.module(check_guards=False)), pixels.example(2))
        program = Program("pt2", program_bytes(exported))
    return Deployable(
        name="int8",
        program=program,
        outputs=outputs,
        call=open_program(program) if exported is None else tree_call(exported.module()),
        source=exported,
        simulated_bits=simulated_bits,
        pixels=pixels,
        names=names,
        dynamic=dynamic or {},
    )


@torch.no_grad()
def _exported(
    name: str,
    model: nn.Module,
    probe: Tree,
    half: str | None,
    pixels: PixelInput | None,
    dynamic: Dynamic | None,
) -> Deployable:
    outputs = trees.call(model, probe)
    model = plain_outputs(model, outputs)
    taken = model if pixels is None else pixels.before(model)
    exported = export_module(taken, probe if pixels is None else pixels.example(2), dynamic)
    return Deployable(
        name=name,
        program=Program("pt2", program_bytes(exported)),
        outputs=trees.plain(outputs),
        call=tree_call(taken),
        source=taken,
        half=half,
        pixels=pixels,
        names=[name for name, _ in trees.named_leaves(probe)],
        dynamic=dynamic or {},
    )


def export_module(model: nn.Module, example: Tree, dynamic: Dynamic | None = None) -> ExportedProgram:
    """Exports a float or half model, as `export_program` does.

    Raises:
        ArtifactError: torch.export cannot trace it.
    """
    try:
        return export_program(model, example, dynamic)
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError, ValueError) as error:
        raise ArtifactError(
            f"torch.export cannot trace {type(model).__name__}: {first_line(error)}",
            "make forward free of branches and shapes that depend on the data; see the cause above for the line",
        ) from error


def simulation(bits: Sequence[int]) -> str:
    """Explains why a model with widths below 8 is neither timed nor written in other formats."""
    widths = " and ".join(map(str, bits))
    return (
        f"its {widths}-bit integers are simulated in 8 bits: no runtime here has kernels for them, "
        "and kernels for 8 bits need not clamp to them"
    )
