"""Refuses parameters and buffers that differ between ranks: only rank 0's are saved, and each rank evaluates its own.

They are checked after the first step, around each evaluation, and before each checkpoint within an epoch. A check
reads every tensor once on its device: ResNet-50's 100 MB take 0.1 s on a CPU core. It reduces 32 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_train.distributed.world import World
from dist_train.errors import NonFiniteLossError, SetupError
from dist_train.strategies.base import Strategy
from dist_train.strategies.shards import has_shards, in_shards, local
from dist_train.training.digests import digest, number_of
from dist_train.training.same_attributes import fingerprint, require_same_outputs
from dist_train.training.state import TrainState
from dist_train.trees import Tree

_STATISTICS = {"running_mean", "running_var"}
# Of a parameter's largest value. Where machines differ, equal gradients give parameters that differ by rounding: the
# order of the sum in a gradient's norm, for one, depends on the CPU's vectors.
_ROUNDING = 1e-4
_SHOWN = 3


def require_sound(strategy: Strategy, state: TrainState, stage: str, example: Tree) -> None:
    """Checks the state before it is evaluated or saved. Collective.

    Args:
        example: inputs of the model's shape, see `require_same_state`.

    Raises:
        SetupError: on every rank, if the model differs between ranks.
        NonFiniteLossError: on every rank, if a parameter is not finite: a finite loss can have infinite gradients.
    """
    require_same_everywhere(strategy, state, stage, example)
    name = not_finite(state.model)
    if has_shards(state.model):  # each rank has looked at its own
        name = next(filter(None, strategy.world.gather(name)), None)
    if name is not None:
        raise NonFiniteLossError(
            f"after step {state.step - 1} the parameter {name} is not finite, but the loss was",
            "lower the learning rate, or set clip_grad_norm; check loss and model for a root or a logarithm of 0",
        )


@torch.no_grad()
def not_finite(model: nn.Module) -> str | None:
    """Returns the name of a parameter with an element that is not finite; None if there is none."""
    ends = {}
    for name, parameter in model.named_parameters():
        own = local(parameter)
        numbers = torch.view_as_real(own) if own.is_complex() else own
        if numbers.is_floating_point() and numbers.numel():
            # With a NaN both are NaN. One pass, where isfinite takes several: a tenth of its time on a CPU.
            ends[name] = torch.stack(numbers.aminmax())
    if not ends:
        return None
    finite = torch.stack([each.double() for each in ends.values()]).isfinite().all(1).tolist()
    return None if all(finite) else list(ends)[finite.index(False)]


def require_same_everywhere(strategy: Strategy, state: TrainState, stage: str, example: Tree) -> None:
    """Applies `require_same_state` to the model and its moving average, and checks a rank's replicas. Collective."""
    strategy.require_same_replicas()
    when = f"after step {state.step - 1} of {stage}"
    require_same_state(strategy.world, state.model, when, example)
    if state.average is not None:
        require_same_state(strategy.world, state.average.module, f"{when}, in the moving average", example)


def require_same_state(world: World, model: nn.Module, when: str, example: Tree) -> None:
    """Refuses a model of which a parameter or a buffer of any shape and dtype differs between ranks. Collective.

    BatchNorm's running statistics are averaged and quantization ranges are merged, so they are equal. A batch norm's
    count of batches may differ, as ranks cut their shares into micro-batches by themselves; only a cumulative average
    reads it. Equal values with other bits (NaN, -0.0) are equal. Plain attributes may differ where the outputs do not.

    Args:
        when: names the moment in the message, such as "after step 3".
        example: inputs as the model takes them, on its device.

    Raises:
        SetupError: on every rank; names the tensors.
    """
    if world.world_size == 1:
        return
    _refuse_cumulative_averages(model)
    state = _state(model)
    digests = _digests(state, world.device)
    # The names travel in the sum: a rank with another buffer gets another sum, and no collective of another size.
    described = [number_of(_described(name, each)) for name, each in state.items()]
    names = torch.tensor(described, dtype=torch.int64, device=world.device)
    total = torch.stack([((digests + names) * (2 * names + 1)).sum(), fingerprint(model, world.device)])
    largest, smallest = world.all_reduce(torch.stack([total, ~total]), "max")
    same_state, same_attributes = (largest == ~smallest).tolist()
    if not same_state:
        _refuse_differences(world, model, state, digests, when)
    if not same_attributes:
        require_same_outputs(world, model, when, example)


def _refuse_cumulative_averages(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.momentum is None and module.track_running_stats:
            raise SetupError(
                f"{name} is a batch norm with momentum=None, whose average over batches differs by rank",
                "give it a momentum, such as 0.1, or train on one process",
            )


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Returns all parameters and buffers, persistent or not, without the batch norms' counts of batches.

    Nor are parameters in shards among them, of which no rank has another's.
    """
    buffers = dict(model.named_buffers())
    norms = {name.rpartition(".")[0] for name in buffers if name.rpartition(".")[2] in _STATISTICS}
    counts = {f"{norm}.num_batches_tracked".removeprefix(".") for norm in norms}
    parameters = {name: each.detach() for name, each in model.named_parameters() if not in_shards(each)}
    return parameters | {name: buffer.detach() for name, buffer in buffers.items() if name not in counts}


def _described(name: str, tensor: Tensor) -> str:
    return f"{name} {tensor.dtype} {list(tensor.shape)}"


@torch.no_grad()
def _digests(state: dict[str, Tensor], device: torch.device) -> Tensor:
    """Returns a hash of each tensor's bytes, int64 [len(state)]: sums of the elements times odd random numbers."""
    if not state:
        return torch.zeros(0, dtype=torch.int64, device=device)
    return torch.stack([digest(tensor).to(device) for tensor in state.values()])


def _refuse_differences(world: World, model: nn.Module, state: dict[str, Tensor], digests: Tensor, when: str) -> None:
    """Compares the tensors whose hashes differ with rank 0's, and raises on every rank if a value differs. Collective.

    Parameters that differ by rounding take rank 0's values, as they would when the run is resumed.

    Raises:
        SetupError: a tensor differs, or exists on some ranks only.
    """
    own = {_described(*each): digest for each, digest in zip(state.items(), digests.tolist(), strict=True)}
    everyone = world.gather(own)
    for rank, theirs in enumerate(everyone):
        only = sorted(theirs.keys() ^ everyone[0].keys())
        if only:
            raise SetupError(
                f"{when} rank {rank} has other parameters or buffers than rank 0: {', '.join(only[:_SHOWN])}",
                "register all of them in __init__, with the same shapes on every rank",
            )
    suspects = [each for each in state if len({theirs[_described(each, state[each])] for theirs in everyone}) > 1]
    parameters = {name for name, _ in model.named_parameters()}
    different = [name for name in suspects if not _takes(world, state[name], name in parameters)]
    everywhere = world.gather(different)
    names = [name for name in suspects if any(name in each for each in everywhere)]
    if not names:
        return
    kind = "parameter" if names[0] in parameters else "buffer"
    more = f"; so do {len(names) - 1} more: {', '.join(names[1 : 1 + _SHOWN])}" if len(names) > 1 else ""
    ranks = ", ".join(str(rank) for rank, each in enumerate(everywhere) if names[0] in each)
    raise SetupError(
        f"the {kind} {names[0]} differs between ranks {when}: it follows each rank's own data, and only rank 0's would "
        f"be saved; rank{'s' if ', ' in ranks else ''} {ranks} differ{'' if ', ' in ranks else 's'} from rank 0{more}",
        "a running mean of rows: name it running_mean or running_var, and it is averaged over the ranks; what "
        "only caches a forward: a plain attribute; otherwise leave it out, or train on one process",
    )


@torch.no_grad()
def _takes(world: World, tensor: Tensor, rounded: bool) -> bool:
    """Tells whether a tensor equals rank 0's; if `rounded`, it takes rank 0's values where it is near. Collective."""
    plain = tensor.cpu().contiguous()
    data = plain.view(-1).view(torch.uint8).numpy().tobytes() if world.is_main else None
    theirs = torch.frombuffer(bytearray(world.broadcast_bytes(data)), dtype=tensor.dtype).view(tensor.shape)
    if torch.allclose(plain, theirs, rtol=0, atol=0, equal_nan=True):
        return True
    largest = float(theirs.abs().max()) if rounded and tensor.is_floating_point() else 0.0
    if not torch.allclose(plain, theirs, rtol=0, atol=_ROUNDING * largest, equal_nan=True):
        return False
    tensor.copy_(theirs)
    return True
