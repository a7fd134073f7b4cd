"""Content of an artifact: a run's models as programs, the formats beside them, and the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dist_train.artifact.deployable import Deployable, simulation
from dist_train.artifact.load import HALF
from dist_train.cluster.instructions import wrong_here
from dist_train.errors import ArtifactError
from dist_train.lowering.autoselect import Choice, written_as
from dist_train.lowering.base import LoweringUnavailable, Written
from dist_train.lowering.trial import Trial
from dist_train.programs.signature import Leaf
from dist_train.trees import Tree


class Bundle:
    """Files of an artifact and its manifest's `models`, while models and formats are added.

    Attributes:
        default: name of the model that is `model.*`; the others are `model.NAME.*`.
        models: the manifest's `models`.
        files: by name.
        judged: the trials of the formats that were added of int8 models, for their gates.
        answers: by model and format, the outputs for the probe of each format's runtime in this process.
    """

    def __init__(self, default: str, models: Mapping[str, Any] | None = None, files: Mapping[str, bytes] | None = None):
        self.default = default
        self.models: dict[str, Any] = dict(models or {})
        self.files: dict[str, bytes] = dict(files or {})
        self.judged: list[Trial] = []
        self.answers: dict[tuple[str, str], Tree] = {}

    def _stem(self, name: str) -> str:
        return "model" if name == self.default else f"model.{name}"

    def add(self, each: Deployable) -> None:
        """Adds the program and its extra files. Formats of an earlier export stay: the model is the same."""
        program, known = each.program, self.models.get(each.name, {})
        file = known.get("file", f"{self._stem(each.name)}.{program.suffix}")
        self.files |= {file: program.data, **program.extra}
        self.models[each.name] = {**known, "file": file, "kind": program.kind, "usage": each.usage}
        if each.simulated_bits:
            self.models[each.name]["simulated_bits"] = list(each.simulated_bits)
        if program.extra:
            self.models[each.name] |= {"extra": sorted(program.extra), "extra_usage": program.extra_usage}

    def add_choice(self, each: Deployable, choice: Choice, probe: Tree) -> list[str]:
        """Adds the chosen format of an added model, unless that is the program itself. Returns lines for the user.

        The manifest records the chosen runtime and the reason in either case.
        """
        best = choice.best
        self.models[each.name].pop("chosen", None)
        if best is not None:
            self.models[each.name]["chosen"] = {"format": best.format, "runtime": best.runtime, "why": choice.why()}
        if best is None or best.written is None:
            return choice.lines()
        return [*choice.lines(), self._add_files(each, best, best.written, probe)]

    def add_format(self, each: Deployable, name: str, probe: Tree, threads: int) -> str:
        """Writes an added model in another format, reads it back in its runtime, and compares the outputs.

        The agreement of decisions is measured where the model has `decisions`, and is left to the gate.

        Returns:
            A line for the user.

        Raises:
            ArtifactError: the format cannot hold the model, or its outputs are wrong.
        """
        written = write_format(each, name, probe, threads)
        trial = Trial(written.runtime, name, written=written)
        trial.compare(written.call, each, probe, each.decisions)
        if trial.left_out:
            report = "take another format, and report this with the model's name"
            raise ArtifactError(
                f"{each.name} as {name} is wrong: {written.runtime} {trial.left_out}",
                wrong_here(report) if each.quantized else report,
            )
        return self._add_files(each, trial, written, probe)

    def _add_files(self, each: Deployable, trial: Trial, written: Written, probe: Tree) -> str:
        """Adds the files of a format. Returns a line for the user."""
        name = trial.format
        names = [f"{self._stem(each.name)}.{suffix}" for suffix in written.files]
        self.files |= dict(zip(names, written.files.values(), strict=True))
        self.models[each.name].setdefault("formats", {})[name] = {
            "files": names,
            "runtime": written.runtime,
            "usage": written.usage,
            "difference": trial.difference,
        }
        with torch.no_grad():
            self.answers[each.name, name] = written.call(probe)
        line = (
            f"{each.name} as {name}: {names[0]}, {written.runtime} differs by {trial.difference:.2g} "
            "of the largest output"
        )
        if trial.agreed is None or each.name != "int8":
            return line
        self.judged.append(trial)
        self.models[each.name]["formats"][name] |= {"agreement": trial.agreed.share, "samples": trial.agreed.samples}
        return f"{line}; same decision on {trial.agreed.share:.2%} of {trial.agreed.samples:,} samples"


def write_format(each: Deployable, name: str, probe: Tree, threads: int) -> Written:
    """See `Bundle.add_format`."""
    if each.simulated_bits:
        raise ArtifactError(
            f"{each.name} cannot be written as {name}: {simulation(each.simulated_bits)}",
            "export fp32, or the program itself (pt2); for a format, a run whose rules have 8 bits",
        )
    if each.source is None:
        raise ArtifactError(
            f"{each.name} is TorchScript, of which {name} cannot be written: its integer weights are packed",
            f"--qat.backend pt2e in a new run gives an int8 model that can be {name}; or export fp32",
        )
    try:
        return written_as(name, each, probe, threads)
    except LoweringUnavailable as reason:
        hint = "take another format or model: --format onnx, --model fp32"
        if each.name in HALF:
            hint = (
                "export fp32 (runtimes choose half themselves), "
                "or train with --half.dtype fp16, which more of them read"
            )
        raise ArtifactError(f"{each.name} cannot be written as {name}: {reason}", hint) from reason


def manifest(
    bundle: Bundle,
    described: Mapping[str, Any],
    task: str,
    results: Mapping[str, Any],
    ranges_sha256: str | None,
    dtype: str = "float32",
    inputs: Sequence[Leaf] = (),
    outputs: Sequence[str] = ("",),
) -> dict[str, Any]:
    """Returns the manifest. A repetition of the run gives an equal one, apart from the choices of `auto`.

    Args:
        dtype: of the models' input; with uint8 the normalization is inside them.
        inputs: leaves of the models' inputs; none: one tensor of the data's `input_shape`.
        outputs: names of the leaves of the outputs; "" for one tensor.
    """
    leaves = inputs or [Leaf("", (None, *described["input_shape"]), dtype)]
    dynamic = described.get("dynamic")
    weights = results["models"].get("int8", {}).get("weights")
    if "int8" in bundle.models and weights is not None:
        bundle.models["int8"]["weights"] = {key: value for key, value in weights.items() if key != "said"}
    return {
        "models": bundle.models,
        "default": bundle.default,
        "task": task,
        **(
            {"input": {"shape": list(leaves[0].shape), "dtype": dtype, "resize": described["resize"]}}
            if [leaf.name for leaf in leaves] == [""]
            else {}
        ),
        "inputs": [leaf.as_json() for leaf in leaves],
        "outputs": list(outputs),
        **({"dynamic": dynamic} if dynamic else {}),
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
    """Returns the names of the models to export, the default first; "half" becomes bf16 or fp16.

    Args:
        wanted: `export.models`.
        half: the dtype of the run's half model, if it has one.
        converted: True for a run with an int8 model.
    """
    if wanted is None:
        return ["int8" if converted else half or "fp32"]
    return [half or name if name == "half" else name for name in dict.fromkeys(wanted)]
