"""Law 2 on real ranks: gradients, losses, statistics and ranges come from the real samples only, at any world size."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_train.distributed.world import World
from dist_train.quantization.ranges import Ranges
from dist_train.training.loop import fit
from dist_train.training.step import train_step
from tests.support.ranks import Ranks, call
from tests.support.training_loops import Draws, Made, Watch, flat, make, mlp, normed

TAILS = (5, 4, 3, 2, 1)
MICRO = (None, 2)
KEPT = ("running_mean", "running_var", "low", "high", "scale", "zero_point", "step_low", "step_high")


def _gradients(world: World, rows: int, micro: int | None) -> dict[str, Any]:
    """Returns the gradients of one global batch of `rows` samples."""
    model = mlp()
    run = make(world, model, size=rows, batch=rows, micro=micro).run
    (batch,) = run.loader.epoch(0, 0, 1)
    wrapped = run.strategy.wrap(model)
    run.strategy.warm_up_buckets(wrapped, batch.micro_batches[0].inputs)
    train_step(wrapped, batch, run.task, run.strategy, run.learner.reduction)
    means = run.learner.reduction.finish(0).means()
    gradients = [parameter.grad for parameter in model.parameters()]
    return {
        "own": batch.rows,
        "loss": means.loss,
        "score": means.score,
        "gradient": torch.cat([each.flatten() for each in gradients if each is not None]).tolist(),
    }


def _losses(world: World, micro: int | None) -> dict[str, Any]:
    model = mlp()
    made = make(
        world,
        model,
        micro=micro,
        config={"clip_grad_norm": 0.5, "ema_decay": 0.8, "optim": {"lr": 0.2, "weight_decay": 0.01}},
    )
    state = fit(made.run, None)
    return {
        "losses": made.recorder.of("loss"),
        "scores": made.recorder.of("score"),
        "parameters": flat(model),
        "average": flat(state.chosen),
        "metrics": state.metrics,
    }


def _normed(world: World, rows: int) -> dict[str, Any]:
    """Returns running statistics and ranges after steps of `rows` samples, and the number of collectives torch ran."""
    model = normed()
    ranges = Ranges(model)

    def buffers() -> dict[str, list[float]]:
        return {
            name: buffer.double().flatten().tolist()
            for name, buffer in model.named_buffers()
            if name.rpartition(".")[2] in KEPT
        }

    watch = Watch(lambda: hashlib.sha256(json.dumps([buffers(), flat(model)]).encode()).hexdigest())
    made = make(
        world,
        model,
        size=3 * rows,
        batch=rows,
        epochs=2,
        hooks=[watch],
        config={"evaluate_every": 2, "optim": {"lr": 0.01}},
    )
    calls = _steps_collectives(made)
    assert ranges.unknown() == []
    return {
        "buffers": buffers(),
        "digests": watch.seen,
        "calls": calls,
        "losses": made.recorder.of("loss"),
    }


def _steps_collectives(made: Made) -> int:
    """Trains; returns the number of all-reduces that torch ran before the first evaluation."""
    evaluations, calls, plain = made.run.learner.evaluate, [0], dist.all_reduce

    def counted(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        return plain(*arguments, **options)

    def uncounted(chosen: torch.nn.Module) -> Any:
        dist.all_reduce = plain
        return evaluations(chosen)

    made.run.learner.evaluate = uncounted
    dist.all_reduce = counted
    fit(made.run, None)
    return calls[0]


def _float_collectives(world: World) -> int:
    return _steps_collectives(make(world, mlp(), config={"evaluate_every": 2}))


def _first_statistics(world: World) -> list[float]:
    """Returns running_mean after a step of 5 rows; means are linear, so shares of 3 and 2 give the mean of all five."""
    model = normed()
    run = make(world, model, size=5, batch=5).run
    (batch,) = run.loader.epoch(0, 0, 1)
    train_step(run.strategy.wrap(model.train()), batch, run.task, run.strategy, run.learner.reduction)
    run.learner.reduction.finish(0)
    mean: list[float] = model.get_buffer("1.running_mean").tolist()
    return mean


def _draws(world: World) -> list[float]:
    drawing = Draws()
    model = nn.Sequential(mlp(), drawing)
    fit(make(world, model).run, None)
    return drawing.drawn[-8:]  # earlier calls belong to the strategy's warm-up


class Carried(nn.Module):
    """A model that has the name of DDP's carrier for a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self._carried = mlp(), nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.inner(x) + self._carried
        return outputs


def _names(world: World) -> dict[str, Any]:
    """Returns the parameters of a trained model that has the carrier's name, and that it trained."""
    model = Carried()
    fit(make(world, model).run, None)
    return {"names": [name for name, _ in model.named_parameters()], "moved": bool(model._carried.any())}


def everything(world: World) -> dict[str, Any]:
    return {
        "gradients": {f"{rows} {micro}": _gradients(world, rows, micro) for rows in TAILS for micro in MICRO},
        "losses": {str(micro): _losses(world, micro) for micro in (None, 2, 3)},
        "normed": {str(rows): _normed(world, rows) for rows in (3, 5, 12)},
        "collectives": _float_collectives(world),
        "draws": _draws(world),
        "first statistics": _first_statistics(world),
        "names": _names(world),
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return everything(World())


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return call(2, "tests.training.test_loop_integration:everything")


@pytest.fixture(scope="module")
def three() -> list[dict[str, Any]]:
    return call(3, "tests.training.test_loop_integration:everything")


def both(two: list[dict[str, Any]], three: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [*two, *three]


@pytest.mark.slow
@pytest.mark.parametrize("micro", MICRO)
@pytest.mark.parametrize("rows", TAILS)
def test_gradients_of_a_tail_are_those_of_one_process(
    rows: int, micro: int | None, alone: dict[str, Any], two: list[dict[str, Any]], three: list[dict[str, Any]]
) -> None:
    reference = alone["gradients"][f"{rows} None"]
    assert max(map(abs, reference["gradient"])) > 1e-2
    for ranks in ([alone], two, three):
        found = [answer["gradients"][f"{rows} {micro}"] for answer in ranks]
        assert sum(each["own"] for each in found) == rows
        for each in found:
            assert each["gradient"] == pytest.approx(reference["gradient"], abs=1e-6)
            assert each["loss"] == pytest.approx(reference["loss"], abs=1e-6) and each["score"] == pytest.approx(
                reference["score"], abs=1e-6
            )


@pytest.mark.parametrize("micro", [None, 2, 3])
def test_losses_weights_and_metrics_are_those_of_one_process(
    micro: int | None, alone: dict[str, Any], two: list[dict[str, Any]], three: list[dict[str, Any]]
) -> None:
    reference = alone["losses"]["None"]
    assert len(reference["losses"]) == 8 and reference["losses"][-1] < reference["losses"][0]
    for answer in [alone, *both(two, three)]:
        found = answer["losses"][str(micro)]
        for name in ("losses", "scores", "parameters", "average"):
            assert found[name] == pytest.approx(reference[name], abs=1e-5), name
        assert found["metrics"] == {
            name: pytest.approx(value, abs=1e-5) for name, value in reference["metrics"].items()
        }


def test_statistics_ranges_and_weights_are_equal_on_all_ranks_to_the_bit_after_every_step(
    two: list[dict[str, Any]], three: list[dict[str, Any]]
) -> None:
    for ranks in (two, three):
        for rows in ("3", "5", "12"):
            digests = [answer["normed"][rows]["digests"] for answer in ranks]
            assert len(set(digests[0])) == 6, "they change at every step"
            assert all(each == digests[0] for each in digests)


@pytest.mark.parametrize("rows", ["3", "5"])
def test_a_rank_without_rows_leaves_no_trace(
    rows: str, alone: dict[str, Any], two: list[dict[str, Any]], three: list[dict[str, Any]]
) -> None:
    # 3 rows fit on one rank, 5 rows on two; a further rank must change nothing.
    without, more = (alone, two + three) if rows == "3" else (two[0], three)
    reference = without["normed"][rows]
    for answer in more:
        assert answer["normed"][rows]["losses"] == pytest.approx(reference["losses"], abs=1e-5)
        for name, values in reference["buffers"].items():
            assert answer["normed"][rows]["buffers"][name] == pytest.approx(values, rel=1e-4, abs=1e-5), name


def test_the_first_steps_mean_is_that_of_all_rows_though_shares_are_uneven(
    alone: dict[str, Any], two: list[dict[str, Any]], three: list[dict[str, Any]]
) -> None:
    assert max(map(abs, alone["first statistics"])) > 1e-3
    for answer in both(two, three):
        assert answer["first statistics"] == pytest.approx(alone["first statistics"], abs=1e-6)


def test_every_step_of_every_rank_draws_its_own_random_numbers(three: list[dict[str, Any]]) -> None:
    drawn = [number for answer in three for number in answer["draws"]]
    assert len(drawn) == len(set(drawn)) == 3 * 8


def test_a_step_takes_no_collective_besides_the_gradients_in_float_training_and_one_with_ranges(
    alone: dict[str, Any], two: list[dict[str, Any]], three: list[dict[str, Any]]
) -> None:
    assert alone["collectives"] == 0
    for answer in both(two, three):
        # Besides, the ranks compare their models after the first step and at the ends of two epochs.
        assert answer["collectives"] == 3, "8 steps"
        assert answer["normed"]["12"]["calls"] == 6 + 3, "6 steps"


def test_the_carrier_of_a_steps_scalars_is_no_part_of_the_model(
    alone: dict[str, Any], two: list[dict[str, Any]], three: list[dict[str, Any]]
) -> None:
    assert "_carried" in alone["names"]["names"] and alone["names"]["moved"]
    assert all(answer["names"] == alone["names"] for answer in both(two, three))


# A non-finite loss.

PLUGIN = """
import os, torch
import dist_train
from dist_train.data.splits import Splits
from torch.utils.data import Dataset

class Planted(Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, index):
        inputs = torch.full((1, 4, 4), index / 64)
        return inputs * float("nan") if index == int(os.environ["PLANTED"]) else inputs, index % 2

@dist_train.register_dataset("nan")
def nan(data):
    return Splits(Planted(), Planted(), 2, ("a", "b"), (0.5,), (0.5,))
"""
CONFIG = """
run: {name: nan, threads_per_rank: 1, device: cpu}
data: {name: nan, global_batch_size: 8}
model: {name: mlp, args: {size: 4, hidden: 4}}
stages: [train]
train: {epochs: 1, optim: {lr: 0.01}}
checkpoint: {every_steps: 2}
log: {every_steps: 1}
debug: {ledger: true}
"""


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_and_names_step_and_rank(tmp_path: Path) -> None:
    from dist_train.data.permutation import derive_key
    from dist_train.data.sampler import ElasticDistributedSampler

    sampler = ElasticDistributedSampler(range(64), 2, 1, seed=derive_key("stage", 0, "train"), global_batch_size=8)
    planted = int(sampler.rank_slice(5).ids[0])
    (tmp_path / "planted_nan.py").write_text(PLUGIN)
    (tmp_path / "nan.yaml").write_text(CONFIG)
    command = [
        "-m",
        "dist_train",
        "run",
        str(tmp_path / "nan.yaml"),
        "--run.dir",
        str(tmp_path / "run"),
        "--import",
        "planted_nan",
    ]
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path)])
    with Ranks(2, command, {"PLANTED": str(planted), "PYTHONPATH": path}) as ranks:
        assert ranks.wait(60) == [1, 1], ranks.printed()
        for rank in (0, 1):
            assert "the loss of step 5 is not finite on rank 1\n  -> " in ranks.output(
                rank
            ) and "Traceback" not in ranks.output(rank), ranks.printed()
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4]
    assert json.loads((tmp_path / "run" / "checkpoints" / "latest.json").read_text()) == {"name": "train-00000004"}
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and "step 5 is not finite on rank 1" in status["error"]
