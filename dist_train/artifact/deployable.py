"""Deployable models: a run's float, half and int8 models with their programs and their outputs for the probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from dist_train.errors import ArtifactError, first_line
from dist_train.lowering.agreement import Decisions
from dist_train.lowering.base import Reference
from dist_train.models.half_precision import Dtype, HalfModel
from dist_train.programs.program import Program, open_program
from dist_train.programs.pt2 import export_program, load_program, program_bytes


@dataclass(frozen=True, kw_only=True)
class Deployable(Reference):
    """One model of a run: the reference for runtimes and formats, and the program that is deployed.

    Attributes:
        name: fp32, bf16, fp16 or int8.
        program: the model as bytes.
        outputs: the outputs of the model in memory, before it became a program, for the probe; float32 [rows, ...].
        simulated_bits: widths below 8 that an int8 model simulates, as no kernel computes in them.
        decisions: of an int8 model, for the gates of its formats; None where only rounding is checked.
    """

    name: str
    program: Program
    outputs: Tensor
    simulated_bits: Sequence[int] = ()
    decisions: Decisions | None = None


def deploy_float(model: nn.Module, probe: Tensor) -> Deployable:
    """Exports the float model.

    Args:
        model: on the CPU, in eval mode.
        probe: float32 [rows, C, H, W], normalized.
    """
    return _exported("fp32", model, probe, None)


def deploy_half(model: nn.Module, dtype: str, probe: Tensor) -> Deployable:
    """Exports the half model of a float one. Arguments as of `deploy_float`; dtype: bf16 or fp16."""
    return _exported(dtype, HalfModel(model, cast(Dtype, dtype)), probe, dtype)


def deploy_int8(program: Program, outputs: Tensor, simulated_bits: Sequence[int] = ()) -> Deployable:
    """Opens an int8 program.

    Args:
        program: the serialized result of `convert`.
        outputs: the outputs of the converted model in memory for the probe.
    """
    exported = load_program(program.data) if program.lowers else None
    return Deployable(
        name="int8",
        program=program,
        outputs=outputs,
        call=open_program(program) if exported is None else exported.module(),
        source=exported,
        simulated_bits=simulated_bits,
    )


@torch.no_grad()
def _exported(name: str, model: nn.Module, probe: Tensor, half: str | None) -> Deployable:
    program = Program("pt2", program_bytes(export_module(model, probe)))
    return Deployable(name=name, program=program, outputs=model(probe), call=model, source=model, half=half)


def export_module(model: nn.Module, example: Tensor) -> ExportedProgram:
    """Exports a float or half model, as `export_program` does.

    Raises:
        ArtifactError: torch.export cannot trace it.
    """
    try:
        return export_program(model, example)
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
