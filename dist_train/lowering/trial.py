"""Trial of a model in one runtime: its outputs, decisions and latency, or the reason why it was left out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from dist_train import trees
from dist_train.cluster.instructions import wrong_here
from dist_train.lowering.agreement import Agreement, Decisions
from dist_train.lowering.base import Call, Reference, Written
from dist_train.lowering.comparison import compare_outputs
from dist_train.run_dir.gates import Gate
from dist_train.trees import Tree


@dataclass
class Trial:
    """A model in one runtime.

    Attributes:
        runtime: its name, with the version where it is known.
        format: the format that is written for it; pt2 for the program itself.
        left_out: the reason why it was left out; "" where it was not.
        difference: largest difference of its outputs from the model's in memory, in units of the largest output.
        agreed: how often it decides as the model in memory; None where that was not measured.
        latency_ms: median milliseconds by model (this one, and fp32) and batch size.
        written: the files of the format; None for pt2.
        calls: by model, as `latency_ms`.
    """

    runtime: str
    format: str
    left_out: str = ""
    difference: float = math.nan
    agreed: Agreement | None = None
    latency_ms: dict[str, dict[str, float]] = field(default_factory=dict)
    written: Written | None = None
    calls: dict[str, Call] = field(default_factory=dict)

    def compare(self, call: Call, reference: Reference, probe: Tree, decisions: Decisions | None) -> None:
        """Measures the outputs on `probe` and on its first row; and the decisions if outputs differ by rounding only.

        `left_out` gets the reason where they differ by more.
        """
        found = compare_outputs(call, reference, (probe, trees.take(probe, slice(1))))
        self.difference = found.difference
        if not found.rounding:
            self.left_out = f"answers differently ({found.difference:.2g} of the largest output)"
        elif decisions is not None:
            self.agreed = decisions.agreement(call)

    def gate(self) -> Gate:
        """Returns the gate of the format's decisions, which were measured."""
        assert self.agreed is not None
        return Gate(
            name=f"format_{self.format}",
            value=self.agreed.share,
            bound=self.agreed.bound,
            passed=self.agreed.passed,
            hint=wrong_here(
                f"leave {self.format} out and take another format or the program itself (pt2), or loosen "
                "--convert.agreement_bound; and run again"
            ),
            detail=f"\nint8 as {self.format} is not written: {self.agreed.in_words()}",
            runtime=self.runtime,
            samples=self.agreed.samples,
        )
