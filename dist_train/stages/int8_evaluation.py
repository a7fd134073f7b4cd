"""Evaluates the int8 model: rank 0 converts it and broadcasts its bytes; each rank evaluates its part of the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dist_train import trees
from dist_train.artifact.deployable import Deployable
from dist_train.distributed.world import World
from dist_train.errors import NonFiniteLossError
from dist_train.lowering import int8_session
from dist_train.lowering.agreement import Decisions
from dist_train.lowering.base import Lowered, LoweringUnavailable
from dist_train.programs.program import Program, open_program
from dist_train.programs.pt2 import load_program
from dist_train.quantization.prepared import PreparedModel
from dist_train.stages.context import Context
from dist_train.training.evaluate import Evaluation, agreement, evaluate
from dist_train.trees import Tree, map_leaves

Call = Callable[..., Any]
T = TypeVar("T")
# For a fast dev run: after two training steps the outputs are close together, and rounding changes some decisions.
_UNTRAINED_BOUND = 0.9


def agreement_bound(context: Context) -> float:
    """Returns `convert.agreement_bound`, lowered in a fast dev run."""
    bound = context.config.convert.agreement_bound
    return min(bound, _UNTRAINED_BOUND) if context.config.debug.fast_dev_run else bound


def convert_on_rank_0(
    context: Context, prepared: PreparedModel, inspect: Callable[[nn.Module], T]
) -> tuple[Program, T]:
    """Converts `prepared` on rank 0; returns the int8 program on every rank. Collective.

    The program's `extra` files stay on rank 0.

    inspect: called on rank 0 with the converted model before it is serialised; its result (JSON) is returned on every
        rank.
    """
    world, made = context.world, list[Program]()
    whole = context.strategy.whole(prepared, everywhere=False)

    def convert() -> T:
        assert isinstance(whole, PreparedModel)
        converted = context.backend.convert(whole.eval())
        found = inspect(converted)
        made.append(context.backend.serialize(converted, context.data.example(2)))
        return found

    found = world.on_rank_0(convert, "converting to int8", context.config.convert.deadline, "convert")
    program = made[0] if made else None
    kind = world.broadcast_bytes(None if program is None else program.kind.encode()).decode()
    data = world.broadcast_bytes(None if program is None else program.data)
    return program or Program(kind, data), found  # type: ignore[arg-type]


def on_cpu(call: Call, world: World) -> Call:
    """Wraps a model that runs on the CPU, so that inputs and outputs are on the rank's device.

    A module takes a tree of inputs as `trees.call` gives it, another function takes the tree.
    """
    run = partial(trees.call, call) if isinstance(call, nn.Module) else call

    def on_device(inputs: Tree) -> Tree:
        outputs = trees.plain(run(_on_cpu(inputs)))
        return map_leaves(lambda leaf: leaf.to(world.device) if isinstance(leaf, Tensor) else leaf, outputs)

    return on_device


def _on_cpu(inputs: Tree) -> Tree:
    return map_leaves(lambda leaf: leaf.cpu().contiguous(), inputs)


def evaluate_int8(context: Context, call: Call) -> Evaluation:
    """Evaluates a model that runs on the CPU, in PyTorch or in a runtime. Collective."""
    with torch.no_grad():
        return evaluate(on_cpu(call, context.world), context.data.evaluation_batches(), context.task, context.world)


@dataclass(frozen=True)
class Judged:
    """An int8 model's evaluation, and its agreement with the fake-quantized model.

    If the model's outputs are not finite, `evaluation` is None and `agreed` is NaN.
    """

    evaluation: Evaluation | None
    agreed: float


def judge(context: Context, call: Call, reference: Evaluation) -> Judged:
    """Evaluates `call` and compares its decisions with `reference` on the whole evaluation set. Collective."""
    try:
        evaluation = evaluate_int8(context, call)
    except NonFiniteLossError:  # on every rank
        return Judged(None, math.nan)
    return Judged(evaluation, agreement(evaluation, reference, context.task, context.world))


def format_decisions(context: Context, deployable: Deployable) -> Decisions:
    """Returns the decisions of the int8 model in PyTorch on `export.agreement_samples`, for the formats' gates.

    Runs on one rank.
    """
    sample = context.data.evaluation_sample(context.config.export.agreement_samples)

    class Inputs:
        """Iterates over the batches' inputs, which are read again for each model."""

        def __iter__(self) -> Iterator[Tree]:
            return (deployable.takes(_on_cpu(batch.inputs)) for batch in sample)

    return Decisions(deployable.call, context.task, Inputs(), agreement_bound(context))


def open_in_runtime(context: Context, program: Program) -> Lowered | str:
    """Opens the program in the runtime `convert.runtime` on every rank; returns the reason if that fails. Collective.

    TorchScript programs, from the backends fx and eager, hold integer kernels and need no other runtime.
    """
    wanted, world = context.config.convert.runtime, context.world
    if not program.lowers:
        return Lowered("torchscript", open_program(program))
    if wanted == "none":
        return "convert.runtime is none"
    lowered: list[bytes] = []

    def lower() -> list[str]:
        """Returns the runtime's name and ""; or "" and the reason why it is not available."""
        try:
            name = int8_session.choose(wanted)
            lowered.append(int8_session.runtime_bytes(name, load_program(program.data), context.data.example(2)))
        except LoweringUnavailable as reason:
            return ["", str(reason)]
        return [name, ""]

    name, reason = world.on_rank_0(lower, "lowering int8", context.config.convert.deadline, "convert")
    if not name:
        return str(reason)
    data = world.broadcast_bytes(lowered[0] if lowered else None)
    call, problem = None, ""
    try:
        call = int8_session.open_in(name, data, context.data.example(2), context.threads)
    except LoweringUnavailable as error:
        problem = str(error)
    problem = next(filter(None, world.gather(problem)), "")  # all ranks open it, or none
    return problem if call is None or problem else Lowered(name, call)
