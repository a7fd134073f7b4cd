"""The int8 model on all ranks: rank 0 converts and broadcasts its bytes, and every rank evaluates its part of the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from dist_train.artifact.deployable import Deployable
from dist_train.distributed.world import World
from dist_train.errors import NonFiniteLossError
from dist_train.lowering import int8_session
from dist_train.lowering.agreement import Decisions
from dist_train.lowering.base import LoweringUnavailable
from dist_train.programs.program import Program, open_program
from dist_train.programs.pt2 import load_program
from dist_train.quantization.prepared import PreparedModel
from dist_train.stages.context import Context
from dist_train.training.evaluate import Evaluation, agreement, evaluate

Call = Callable[[Tensor], Tensor]
T = TypeVar("T")
# For a fast dev run: after two batches a model decides by a hair, and rounding tips some decisions.
_UNTRAINED_BOUND = 0.9


def agreement_bound(context: Context) -> float:
    """Returns `convert.agreement_bound`, or what can be asked of a fast dev run."""
    bound = context.config.convert.agreement_bound
    return min(bound, _UNTRAINED_BOUND) if context.config.debug.fast_dev_run else bound


def convert_on_rank_0(
    context: Context, prepared: PreparedModel, inspect: Callable[[nn.Module], T]
) -> tuple[Program, T]:
    """Returns the int8 program of `prepared` on every rank; its `extra` files stay on rank 0. Collective.

    inspect: called on rank 0 with the converted model in memory, before it is serialised; its result (JSON) reaches
        every rank.
    """
    world, made = context.world, list[Program]()

    def convert() -> T:
        converted = context.backend.convert(prepared.eval())
        found = inspect(converted)
        made.append(context.backend.serialize(converted, context.data.example(2)))
        return found

    found = world.on_rank_0(convert, "converting to int8", context.config.convert.deadline, "convert")
    program = made[0] if made else None
    kind = world.broadcast_bytes(None if program is None else program.kind.encode()).decode()
    data = world.broadcast_bytes(None if program is None else program.data)
    return program or Program(kind, data), found  # type: ignore[arg-type]


def on_cpu(call: Call, world: World) -> Call:
    """Wraps a model that runs on the CPU for inputs on the rank's device."""

    def on_device(inputs: Tensor) -> Tensor:
        return call(inputs.cpu().contiguous()).to(world.device)

    return on_device


def evaluate_int8(context: Context, call: Call) -> Evaluation:
    """Evaluates a model that runs on the CPU, in process or in a runtime. Collective."""
    with torch.no_grad():
        return evaluate(on_cpu(call, context.world), context.data.evaluation_batches(), context.task, context.world)


@dataclass(frozen=True)
class Judged:
    """An int8 model's evaluation, and its agreement with the fake-quantized one: NaN, and no evaluation, where it answers NaN."""

    evaluation: Evaluation | None
    agreed: float


def judge(context: Context, call: Call, reference: Evaluation) -> Judged:
    """Compares decisions with those of `reference`, over the whole evaluation set. Collective."""
    try:
        evaluation = evaluate_int8(context, call)
    except NonFiniteLossError:  # on every rank
        return Judged(None, math.nan)
    return Judged(evaluation, agreement(evaluation, reference, context.task, context.world))


def format_decisions(context: Context, deployable: Deployable) -> Decisions:
    """Returns what the int8 model in process decides on `export.agreement_samples`, for the formats' gates. On one rank."""
    sample = context.data.evaluation_sample(context.config.export.agreement_samples)

    class Inputs:
        """Inputs of the batches; read anew for each model that is asked."""

        def __iter__(self) -> Iterator[Tensor]:
            return (batch.inputs.cpu().contiguous() for batch in sample)

    return Decisions(deployable.candidate.call, context.task, Inputs(), agreement_bound(context))


@dataclass(frozen=True)
class InRuntime:
    """An int8 model in the runtime in which it is judged."""

    name: str
    call: Call


def open_in_runtime(context: Context, program: Program) -> InRuntime | str:
    """Opens the program in the runtime that `convert.runtime` names, on every rank; else says why not. Collective.

    TorchScript, which fx and eager make, holds integer kernels and is its own runtime.
    """
    wanted, world = context.config.convert.runtime, context.world
    if program.kind == "torchscript":
        return InRuntime("torchscript", open_program(program))
    if wanted == "none":
        return "convert.runtime is none"
    lowered: list[bytes] = []

    def lower() -> list[str]:
        """Returns the runtime's name, or nothing and a reason."""
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
    problem = next(filter(None, world.gather(problem)), "")  # all ranks, or none
    return problem if call is None or problem else InRuntime(name, call)
