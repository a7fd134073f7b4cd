"""One model of a run as it is deployed: its program, its answer to the probe, and how a format of it was judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dist_train.errors import ArtifactError
from dist_train.lowering.agreement import Agreement, Decisions
from dist_train.lowering.comparison import Candidate
from dist_train.models.half_precision import Dtype, HalfModel
from dist_train.programs.program import Program, open_program
from dist_train.programs.pt2 import load_program, program_bytes


@dataclass(frozen=True)
class Judged:
    """A format of an int8 model, and how often it decides in its runtime as the model in memory does."""

    format: str
    runtime: str
    agreed: Agreement

    def gate(self) -> dict[str, Any]:
        """Its gate, as the arguments of `Context.gate`; JSON."""
        return {
            "name": f"format_{self.format}",
            "value": self.agreed.share,
            "bound": self.agreed.bound,
            "passed": self.agreed.passed,
            "hint": f"leave {self.format} out and take another format or the program itself (pt2), or loosen "
            "--convert.agreement_bound; and run again",
            "detail": f"\nint8 as {self.format} is not written: {self.agreed.in_words()}",
            "runtime": self.runtime,
            "samples": self.agreed.samples,
        }


@dataclass(frozen=True)
class Deployable:
    """One model of a run.

    Attributes:
        name: fp32, bf16, fp16 or int8.
        program: what is deployed.
        outputs: the answer of the model in memory, before it became a program, to the probe; float32 [rows, ...].
        candidate: the same for a runtime and for other formats.
        simulated_bits: widths below 8 that an int8 model simulates; see `QATConfig.simulated_bits`.
        decisions: of an int8 model, as which it must decide in every format; None: it is held to rounding alone.
    """

    name: str
    program: Program
    outputs: Tensor
    candidate: Candidate
    simulated_bits: Sequence[int] = ()
    decisions: Decisions | None = None


def deploy_float(model: nn.Module, probe: Tensor) -> Deployable:
    """model: the float one on the CPU, in eval mode. probe: float32 [rows, C, H, W], normalised."""
    return _exported("fp32", model, probe, None)


def deploy_half(model: nn.Module, dtype: str, probe: Tensor) -> Deployable:
    """model: the float one on the CPU."""
    return _exported(dtype, HalfModel(model, cast(Dtype, dtype)), probe, dtype)


def deploy_int8(program: Program, outputs: Tensor, simulated_bits: Sequence[int] = ()) -> Deployable:
    """program, outputs: what `convert` made, and what the converted model answered to the probe."""
    if program.kind == "torchscript":
        return Deployable("int8", program, outputs, Candidate(open_program(program), None))
    exported = load_program(program.data)
    return Deployable("int8", program, outputs, Candidate(exported.module(), exported), simulated_bits)


@torch.no_grad()
def _exported(name: str, model: nn.Module, probe: Tensor, half: str | None) -> Deployable:
    program = Program("pt2", program_bytes(export_module(model, probe)))
    return Deployable(name, program, model(probe), Candidate(model, model, half))


def export_module(model: nn.Module, example: Tensor) -> ExportedProgram:
    """A float or half model as a program whose batch size is free. Of `example`, [B, C, H, W], the shape without B counts.

    Raises:
        ArtifactError: torch.export cannot trace it.
    """
    try:
        zeros = torch.zeros(2, *example.shape[1:])  # one row would make the batch size a constant
        return torch.export.export(model, (zeros,), dynamic_shapes=({0: Dim("batch", min=1)},))
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError, ValueError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ArtifactError(
            f"torch.export cannot trace {type(model).__name__}: {reason}",
            "make forward free of branches and shapes that depend on the data; see the cause above for the line",
        ) from error


def simulation(bits: Sequence[int]) -> str:
    """What there is to know of a model with widths below 8."""
    widths = " and ".join(map(str, bits))
    return f"its {widths}-bit integers are simulated in 8 bits: no runtime here has kernels for them, and those of 8 bits need not clamp to them"
