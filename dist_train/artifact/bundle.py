"""What is deployed of a run: its models as programs, the formats beside them, and the manifest; all on the CPU, in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_train import registry
from dist_train.artifact.deployable import Deployable, Judged, simulation
from dist_train.artifact.load import HALF
from dist_train.errors import ArtifactError
from dist_train.lowering.agreement import Agreement
from dist_train.lowering.autoselect import Choice
from dist_train.lowering.base import LoweringUnavailable, Written
from dist_train.lowering.comparison import is_rounding, relative_difference

_SUFFIXES = {"pt2": "pt2", "torchscript": "ts"}


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
