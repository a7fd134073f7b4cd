"""A stage with settings."""

from typing import Any

import torch

import dist_train


class NormsConfig(dist_train.Settings):
    order: float = 2.0
    """Order of the norm that is noted of each parameter."""


@dist_train.register_stage("norms", settings=NormsConfig)
class Norms(dist_train.Stage):
    """Records the norm of each parameter of the float model in results.json."""

    settings: NormsConfig

    def run(self, context: Any) -> dict[str, Any]:
        return {
            "norms": {
                name: float(torch.linalg.vector_norm(value.detach(), self.settings.order))
                for name, value in context.model.named_parameters()
            }
        }

    def restore(self, context: Any, product: dict[str, Any]) -> None:
        context.results["norms"] = product["norms"]
