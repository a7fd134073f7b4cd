"""What is deployed of a run: its models as programs, the formats beside them, and the manifest; all on the CPU, in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dist_train import registry
from dist_train.artifact import HALF
from dist_train.data.arrays import Splits
from dist_train.errors import ArtifactError
from dist_train.half import Dtype, HalfModel
from dist_train.lowering.base import LoweringUnavailable, Written
from dist_train.lowering.choice import Choice
from dist_train.lowering.comparison import Candidate, is_rounding, relative_difference
from dist_train.lowering.decisions import Agreement, Decisions
from dist_train.program import Program, load_program, open_program, program_bytes

_SUFFIXES = {"pt2": "pt2", "torchscript": "ts"}


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
        simulated_bits: widths below 8 that an int8 model simulates; see `config_fit.simulated_bits`.
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


class Bundle:
    """The files of an artifact and what the manifest says of them, as models and formats are added.

    Attributes:
        default: name of the model that is `model.*`; the others are `model.NAME.*`.
        models: the manifest's `models`.
        files: by name.
        judged: the formats that were added of int8 models, for their gates.
        answers: to the probe, of each format that was added, by model and format, as its runtime gave them here.
    """

    def __init__(self, default: str, models: Mapping[str, Any] | None = None, files: Mapping[str, bytes] | None = None):
        self.default = default
        self.models: dict[str, Any] = dict(models or {})
        self.files: dict[str, bytes] = dict(files or {})
        self.judged: list[Judged] = []
        self.answers: dict[tuple[str, str], Tensor] = {}

    def _stem(self, name: str) -> str:
        return "model" if name == self.default else f"model.{name}"

    def add(self, each: Deployable) -> None:
        """The program and its extra files. Formats of an earlier export stay: the model is the same."""
        program, known = each.program, self.models.get(each.name, {})
        file = known.get("file", f"{self._stem(each.name)}.{_SUFFIXES[program.kind]}")
        self.files |= {file: program.data, **program.extra}
        self.models[each.name] = {**known, "file": file, "kind": program.kind}
        if each.simulated_bits:
            self.models[each.name]["simulated_bits"] = list(each.simulated_bits)
        if program.extra:
            self.models[each.name]["extra"] = sorted(program.extra)

    def add_choice(self, each: Deployable, choice: Choice, probe: Tensor) -> list[str]:
        """Adds the format that was chosen for an added model; nothing where that is the program itself.

        The manifest says which runtime was chosen and why, whichever it is. Returns lines for the user.
        """
        best = choice.best
        self.models[each.name].pop("chosen", None)
        if best is not None:
            self.models[each.name]["chosen"] = {"format": best.format, "runtime": best.runtime, "why": choice.why()}
        if best is None or best.written is None:
            return choice.lines()
        line = self._list(each, best.format, probe, best.written, best.difference, best.agreed)
        return [*choice.lines(), line]

    def add_format(self, each: Deployable, name: str, probe: Tensor, threads: int) -> str:
        """Writes an added model in another format too, reads it back in its runtime, and holds its answers against the model's.

        Whether it decides as the model does is measured, where the model has `decisions`, and left to the gate. Returns a line for
        the user.

        Raises:
            ArtifactError: the format and the model do not go together, or its answers are wrong.
        """
        written = write_format(each, name, probe, threads)
        sizes = (probe, probe[:1])  # one row too: OpenVINO was seen to go wrong there alone
        differences = [relative_difference(written.call, each.candidate.call, rows) for rows in sizes]
        difference = max(differences)
        if not all(is_rounding(found, each.candidate, rows) for found, rows in zip(differences, sizes, strict=True)):
            raise ArtifactError(
                f"{each.name} as {name} is wrong: {written.runtime} answers differently "
                f"({difference:.2g} of the largest output)",
                "take another format, and report this with the model's name",
            )
        agreed = None if each.decisions is None else each.decisions.agreement(written.call)
        return self._list(each, name, probe, written, difference, agreed)

    def _list(
        self, each: Deployable, name: str, probe: Tensor, written: Written, difference: float, agreed: Agreement | None
    ) -> str:
        """Takes the files of a format in; a line for the user."""
        names = [f"{self._stem(each.name)}.{suffix}" for suffix in written.files]
        self.files |= dict(zip(names, written.files.values(), strict=True))
        self.models[each.name].setdefault("formats", {})[name] = {
            "files": names,
            "runtime": written.runtime,
            "usage": written.usage,
            "difference": difference,
        }
        with torch.no_grad():
            self.answers[each.name, name] = written.call(probe)
        line = f"{each.name} as {name}: {names[0]}, {written.runtime} differs by {difference:.2g} of the largest output"
        if agreed is None or each.name != "int8":
            return line
        self.judged.append(Judged(name, written.runtime, agreed))
        self.models[each.name]["formats"][name] |= {"agreement": agreed.share, "samples": agreed.samples}
        return f"{line}; same decision on {agreed.share:.2%} of {agreed.samples:,} samples"


def write_format(each: Deployable, name: str, probe: Tensor, threads: int) -> Written:
    """See `Bundle.add_format`."""
    if each.simulated_bits:
        raise ArtifactError(
            f"{each.name} cannot be written as {name}: {simulation(each.simulated_bits)}",
            "export fp32, or the program itself (pt2); for a format, a run whose rules have 8 bits",
        )
    if each.candidate.source is None:
        raise ArtifactError(
            f"{each.name} is TorchScript, of which {name} cannot be written: its integer weights are packed",
            f"--qat.backend pt2e in a new run gives an int8 model that can be {name}; or export fp32",
        )
    write: Callable[..., Written] = registry.export_formats.get(name)
    try:
        return write(each.candidate.source, probe, threads)
    except LoweringUnavailable as reason:
        hint = "take another format or model: --format onnx, --model fp32"
        if each.name in HALF:
            hint = "export fp32 (runtimes choose half themselves), or train with --half.dtype fp16, which more of them read"
        raise ArtifactError(f"{each.name} cannot be written as {name}: {reason}", hint) from reason


def simulation(bits: Sequence[int]) -> str:
    """What there is to know of a model with widths below 8."""
    widths = " and ".join(map(str, bits))
    return f"its {widths}-bit integers are simulated in 8 bits: no runtime here has kernels for them, and those of 8 bits need not clamp to them"


def describe_data(splits: Splits) -> dict[str, Any]:
    """What a model must be told of the data that it was trained on; JSON."""
    return {
        "input_shape": list(splits.input_shape),
        "resize": splits.resize,
        "mean": list(splits.mean),
        "std": list(splits.std),
        "classes": list(splits.classes),
        "num_outputs": getattr(splits, "num_outputs", splits.num_classes),
    }


def manifest(
    bundle: Bundle, described: Mapping[str, Any], task: str, results: Mapping[str, Any], ranges_sha256: str | None
) -> dict[str, Any]:
    """What a user of the artifact must know; nothing that differs between a run and its repetition, but what `auto` chose."""
    weights = results["models"].get("int8", {}).get("weights")
    if "int8" in bundle.models and weights is not None:
        bundle.models["int8"]["weights"] = {key: value for key, value in weights.items() if key != "said"}
    return {
        "models": bundle.models,
        "default": bundle.default,
        "task": task,
        "input": {
            "shape": [None, *described["input_shape"]],
            "dtype": "float32",
            "resize": described["resize"],
        },
        "normalization": {"mean": described["mean"], "std": described["std"]},
        "classes": described["classes"],
        "ranges_sha256": ranges_sha256,
        "world_sizes": results["world_sizes"],
        "metrics": {
            name: {key: value for key, value in figures.items() if isinstance(value, (int, float)) and key != "bytes"}
            for name, figures in results["models"].items()
        },
    }


def chosen_models(wanted: Sequence[str] | None, half: str | None, converted: bool) -> list[str]:
    """The models to export, the default first, by their names: half is bf16 or fp16.

    wanted: `export.models`. half: the dtype where the run has a half model. converted: whether it has an int8 one.
    """
    if wanted is None:
        return ["int8" if converted else half or "fp32"]
    return [half or name if name == "half" else name for name in dict.fromkeys(wanted)]
