"""Is the model, and what the backend made of it, still what this run began with? A resumed run asks before it loads a state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.errors import RunDirError
from dist_train.fingerprint import differences, fingerprint

FLOAT, PREPARED = "float", "prepared"
_CHANGED = {
    FLOAT: "the model's code computes something else than when this run began",
    PREPARED: "quantization prepares another model than when this run began: the backend, its rules or the libraries changed",
}


class SameModel:
    """Fingerprints of a run's models, kept with every checkpoint.

    Operators go by other names on other devices and in other versions of torch: where these changed nothing is compared.
    """

    def __init__(self) -> None:
        self._where = {"torch": torch.__version__.partition("+")[0], "device": "cpu"}
        self._recorded: dict[str, Any] = {}
        self._found: dict[str, Any] = {}

    def require(self, name: str, model: nn.Module, example: Tensor) -> None:
        """Takes the fingerprint of the `FLOAT` or the `PREPARED` model, as built, before any state is loaded into it.

        Args:
            example: [B, ...], on the model's device.

        Raises:
            RunDirError: a checkpoint that was restored has another one of that name; it shows the first differences.
        """
        self._where["device"] = example.device.type
        self._found[name] = fingerprint(model, example)
        self._compare(name)

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """state: as `state_dict` gave it; None: of a version that kept none.

        Raises:
            RunDirError: as `require`, of what was taken before.
        """
        if state is not None and state["where"] == self._where:
            self._recorded = dict(state["models"])
            for name in self._found:
                self._compare(name)

    def state_dict(self) -> dict[str, Any]:
        return {"where": dict(self._where), "models": self._recorded | self._found}

    def _compare(self, name: str) -> None:
        recorded, found = self._recorded.get(name), self._found[name]
        if recorded is not None and recorded != found:
            lines = "".join(f"\n    {line}" for line in differences(recorded, found))
            raise RunDirError(
                f"{_CHANGED[name]}:{lines}",
                "undo the change to resume the run, or start a new one with --run.name NEW or --run.dir DIR",
            )
