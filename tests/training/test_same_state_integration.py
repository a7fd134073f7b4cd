"""State that follows a rank's own data is refused by name on every rank, whatever its shape and whenever it begins."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dist_train.distributed.world import World
from dist_train.errors import SetupError
from dist_train.training.loop import fit
from dist_train.training.same_state import require_same_state
from tests.support.ranks import call
from tests.support.training_loops import CLASSES, make, mlp


class Follower(nn.Module):
    """Passes its inputs on, and updates the tensor `state` by `follow(state, inputs, step)`."""

    def __init__(
        self,
        state: torch.Tensor,
        follow: Callable[[torch.Tensor, torch.Tensor, int], Any],
        persistent: bool = True,
        name: str = "state",
        when_training: bool = True,
    ) -> None:
        super().__init__()
        self.register_buffer("step", torch.tensor(0))
        self._follow, self._name, self._when_training = follow, name, when_training
        if isinstance(state, nn.Parameter):
            self.register_parameter(name, state)
        else:
            self.register_buffer(name, state, persistent=persistent)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training == self._when_training:
            self._follow(getattr(self, self._name), x, int(self.get_buffer("step")))
        if self.training:
            self.get_buffer("step").add_(1)
        return x


def _mean(state: torch.Tensor, x: torch.Tensor, step: int) -> None:
    state.lerp_(x.mean(), 0.1)


def _mean_from_step_3(state: torch.Tensor, x: torch.Tensor, step: int) -> None:
    if step >= 3:
        _mean(state, x, step)


def _rows(state: torch.Tensor, x: torch.Tensor, step: int) -> None:
    state.add_(len(x))


def _bright(state: torch.Tensor, x: torch.Tensor, step: int) -> None:
    state.copy_(x.mean((1, 2, 3))[:2] > x.mean((1, 2, 3))[:2].mean())


PLANTS: dict[str, Callable[[], Follower]] = {
    "running loss": lambda: Follower(torch.tensor(0.0), _mean),
    "from step 3": lambda: Follower(torch.zeros(()), _mean_from_step_3),
    "matrix from step 3": lambda: Follower(torch.zeros(2, 3), _mean_from_step_3),
    "rows": lambda: Follower(torch.tensor(0), _rows),
    "half": lambda: Follower(torch.zeros(3, dtype=torch.float16), lambda state, x, step: state.add_(x.mean().half())),
    "not saved": lambda: Follower(torch.tensor(0.0), _mean, persistent=False),
    "frozen parameter": lambda: Follower(nn.Parameter(torch.tensor(0.0), requires_grad=False), _mean_from_step_3),
    "own count of batches": lambda: Follower(torch.tensor(0), _rows, name="num_batches_tracked"),
    "evaluation": lambda: Follower(torch.tensor(0.0), _mean, when_training=False),
}


class Attributed(nn.Module):
    """Keeps something of each forward in the plain attribute `kept`, and may read it in the next one."""

    def __init__(self, keep: Callable[[Any, torch.Tensor], Any], read: bool = True) -> None:
        super().__init__()
        self.kept: Any = torch.zeros(())
        self._keep, self._read = keep, read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = self.kept
        if self.training:
            self.kept = self._keep(self.kept, x)
        if not self._read:
            return x
        kept = kept[0] if isinstance(kept, (list, tuple)) else kept["mean"] if isinstance(kept, dict) else kept
        return x - torch.as_tensor(kept, dtype=x.dtype)


ATTRIBUTES: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "tensor": lambda kept, x: x.detach().mean(),
    "for each pixel": lambda kept, x: x.detach().mean(0),
    "in place": lambda kept, x: kept.copy_(0.9 * kept + 0.1 * x.detach().mean()),
    "number": lambda kept, x: float(x.mean()),
    "list": lambda kept, x: [x.detach().mean()],
    "dictionary": lambda kept, x: {"mean": x.detach().mean()},
    "array": lambda kept, x: x.detach().mean().numpy(),
}
CACHES: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "activations": lambda kept, x: x,
    "activations with a history": lambda kept, x: x * torch.ones((), requires_grad=True),
    "rows seen": lambda kept, x: int(kept) + len(x),
    "all of them": lambda kept, x: [*(kept if isinstance(kept, list) else []), x.detach()],
    "the same": lambda kept, x: torch.ones(3),
    "sparse": lambda kept, x: x.detach().flatten(1).to_sparse(),
}


def refusals(world: World) -> dict[str, Any]:
    """Returns the refusal of each planted model, and the steps that were saved before it."""
    found = {}
    for name, plant in PLANTS.items():
        made = make(world, nn.Sequential(plant(), mlp()), checkpoint_every=2)
        try:
            fit(made.run, None)
            message = ""
        except SetupError as error:
            message = error.message
        found[name] = {"message": message, "saved": made.memory.saved, "evaluated": made.recorder.of("eval_loss")}
    for name, keep in ATTRIBUTES.items():
        try:
            fit(make(world, nn.Sequential(Attributed(keep), mlp())).run, None)
            found[f"attribute: {name}"] = ""
        except SetupError as error:
            found[f"attribute: {name}"] = str(error)
    for name, keep in CACHES.items():
        found[f"cache: {name}"] = fit(make(world, nn.Sequential(Attributed(keep, False), mlp())).run, None).step
    return {**found, "uneven": uneven_micro_batches(world), "running mean": running_mean(world)}


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return call(2, "tests.training.test_same_state_integration:refusals")


@pytest.mark.parametrize("plant", PLANTS)
def test_state_of_own_rows_is_refused_on_every_rank_by_name(plant: str, two: list[dict[str, Any]]) -> None:
    first, second = (answer[plant] for answer in two)
    name = "0.num_batches_tracked" if plant == "own count of batches" else "0.state"
    kind = "parameter" if plant == "frozen parameter" else "buffer"
    assert first["message"] == second["message"]
    assert first["message"].startswith(f"the {kind} {name} differs between ranks after step ")
    assert "rank 1 differs from rank 0" in first["message"]
    assert first["evaluated"] == []


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_an_attribute_of_own_rows_that_outputs_follow_is_refused(kind: str, two: list[dict[str, Any]]) -> None:
    first, second = (answer[f"attribute: {kind}"] for answer in two)
    inner = {"list": "[0]", "dictionary": "['mean']"}.get(kind, "")
    assert first == second and first.startswith(f"the attribute 0.kept{inner} differs between ranks after step 0")
    assert "  -> a running mean of rows: register_buffer" in first


@pytest.mark.parametrize("kind", CACHES)
def test_an_attribute_that_no_output_follows_may_hold_a_ranks_own_rows(kind: str, two: list[dict[str, Any]]) -> None:
    assert two[0][f"cache: {kind}"] == two[1][f"cache: {kind}"] == 8


def test_the_refusal_comes_before_the_state_is_saved(two: list[dict[str, Any]]) -> None:
    saved = {plant: two[0][plant]["saved"] for plant in PLANTS}
    # Of 37 rows, only the fourth step has uneven shares.
    late = {"from step 3": [2], "matrix from step 3": [2], "frozen parameter": [2], "evaluation": [2]}
    uneven = {"rows": [2], "own count of batches": [2]}
    assert saved == {plant: [] for plant in PLANTS} | late | uneven


class Reassigning(nn.Module):
    """Gives its running mean, a scalar, a new tensor at each step."""

    running_mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.tensor(0.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.running_mean = torch.lerp(self.running_mean, x.detach().mean(), 0.1)
        return x - self.running_mean


def running_mean(world: World) -> float:
    reassigning = Reassigning()
    fit(make(world, nn.Sequential(reassigning, mlp())).run, None)
    return float(reassigning.running_mean)


def test_a_running_mean_of_any_module_is_averaged_over_the_rows_of_all_ranks(two: list[dict[str, Any]]) -> None:
    means = [answer["running mean"] for answer in two]
    assert means[0] == means[1] == pytest.approx(running_mean(World()), abs=1e-5)


class Plain(nn.Module):
    def __init__(self, **buffers: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)


def _said(world: World, model: nn.Module) -> str:
    try:
        require_same_state(world, model, "now", torch.zeros(2, 1, 4, 4))
    except SetupError as error:
        return error.message
    return ""


def comparisons(world: World) -> dict[str, Any]:
    own = float(world.rank)
    signalling = torch.tensor([0x7FC00000 + world.rank], dtype=torch.int32).view(torch.float32)
    near, far = Plain(), Plain()
    with torch.no_grad():
        near.weight += 1e-6 * own
        far.weight += 1e-2 * own
    lone = Plain(**({"late": torch.zeros(3)} if world.rank == 1 else {}))
    normed = nn.Sequential(nn.BatchNorm1d(3))
    normed.get_buffer("0.num_batches_tracked").add_(world.rank)
    return {
        "equal": _said(world, Plain(zero=torch.tensor(0.0), flag=torch.tensor(True), none=torch.zeros(0))),
        "nan": _said(world, Plain(nan=signalling)),
        "nan on one rank": _said(world, Plain(value=torch.tensor(math.nan if world.rank else 0.0))),
        "zeros": _said(world, Plain(zero=torch.tensor(-0.0 if world.rank else 0.0))),
        "flag": _said(world, Plain(flag=torch.tensor(world.rank == 1))),
        "large integer": _said(world, Plain(count=torch.tensor(2**62 + world.rank))),
        "permuted": _said(world, Plain(pair=torch.tensor([own, 1 - own]))),
        "several": _said(world, Plain(a=torch.tensor(own), b=torch.tensor(own), same=torch.tensor(3))),
        "rounding": [_said(world, near), near.weight.tolist()],
        "trained apart": _said(world, far),
        "on one rank": _said(world, lone),
        "other shape": _said(world, Plain(grown=torch.zeros(1 + world.rank))),
        "batch norm": _said(world, normed),
        "cumulative": _said(world, nn.Sequential(nn.BatchNorm1d(3, momentum=None))),
    }


@pytest.fixture(scope="module")
def compared() -> dict[str, Any]:
    answers = call(3, "tests.training.test_same_state_integration:comparisons")
    assert answers[0] == answers[1] == answers[2]
    return answers[0]


def test_equal_values_are_equal_whatever_their_bits(compared: dict[str, Any]) -> None:
    assert [compared[name] for name in ("equal", "nan", "zeros", "batch norm")] == [""] * 4
    assert compared["rounding"] == ["", [1.0] * 3], "rank 0's values"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("nan on one rank", "the buffer value differs"),
        ("flag", "the buffer flag differs"),
        ("large integer", "the buffer count differs"),
        ("permuted", "the buffer pair differs"),
        ("several", "ranks 1, 2 differ from rank 0; so do 1 more: b"),
        ("trained apart", "the parameter weight differs"),
        ("on one rank", "now rank 1 has other parameters or buffers than rank 0: late torch.float32 [3]"),
        ("other shape", "now rank 1 has other parameters or buffers than rank 0: grown"),
        ("cumulative", "0 is a batch norm with momentum=None"),
    ],
)
def test_a_difference_is_named(case: str, message: str, compared: dict[str, Any]) -> None:
    assert message in compared[case]


def uneven_micro_batches(world: World) -> int:
    """Trains a batch norm on shares that are cut into 2 micro-batches on one rank and 1 on the other."""
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, CLASSES))
    fit(make(world, model, size=7, batch=7, micro=2, epochs=2).run, None)
    return int(model.get_buffer("1.num_batches_tracked"))


def test_a_batch_norms_count_of_batches_may_differ(two: list[dict[str, Any]]) -> None:
    assert two[0]["uneven"] != two[1]["uneven"]
