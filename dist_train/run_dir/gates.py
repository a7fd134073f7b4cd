"""Gates: measured fidelities with their bounds, in results.json."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dist_train.errors import GateError
from dist_train.run_dir.files import replace_json
from dist_train.run_dir.paths import RunDir
from dist_train.run_dir.retry import told


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A measured fidelity.

    Attributes:
        passed: whether `value` lies within `bound`; a value that is not finite never passes.
        hint: what to type where it failed.
        detail: what a failure says besides the figures, on rank 0.
        runtime: where it was measured, if not in process.
        samples: on how many, where that is not the whole evaluation set.
    """

    name: str
    value: float
    bound: float
    passed: bool
    hint: str
    detail: str = ""
    runtime: str = ""
    samples: int = 0

    @property
    def holds(self) -> bool:
        return self.passed and math.isfinite(self.value)

    def record(self) -> dict[str, Any]:
        """Returns the gate's entry in results.json. JSON has no NaN: a value that is not finite is null."""
        value = self.value if math.isfinite(self.value) else None
        entry = {"value": value, "bound": self.bound, "passed": self.holds}
        extra = {"runtime": self.runtime, "samples": self.samples}
        return entry | {key: value for key, value in extra.items() if value}

    def require(self, with_detail: bool = True) -> None:
        """Raises GateError where it does not hold."""
        if not self.holds:
            place = f" in {self.runtime}" if self.runtime else ""
            message = f"the gate `{self.name}` failed{place}: measured {self.value:.6g}, bound {self.bound:g}"
            raise GateError(message + (self.detail if with_detail else ""), self.hint)


class Gates:
    """Records gates in the results of a run, and ends the run at one that fails."""

    def __init__(self, run_dir: RunDir, results: dict[str, Any], is_main: bool) -> None:
        self._run_dir, self._results, self._is_main = run_dir, results, is_main

    def check(self, gate: Gate) -> None:
        """Records a gate; called by every rank. Rank 0 writes results.json before a failure ends the run.

        Raises:
            GateError: on every rank, where it does not hold.
        """
        self._results["gates"][gate.name] = gate.record()
        self._results.get("gates_skipped", {}).pop(gate.name, None)
        if not gate.holds and self._is_main:
            told(lambda: replace_json(self._run_dir.results, self._results), self._run_dir.results)
        gate.require(with_detail=self._is_main)

    def skip(self, name: str, reason: str) -> None:
        """Records why a gate did not run: beside `gates`, whose entries were all measured."""
        self._results.setdefault("gates_skipped", {})[name] = reason
