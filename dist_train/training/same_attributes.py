"""Refuses plain attributes of modules that differ between ranks, where the model's outputs differ with them.

A forward may leave its rank's own rows in an attribute, as an activation for a loss or a map to look at: that changes
nothing. A running mean in an attribute does, and no checkpoint holds it. So the outputs for equal inputs decide, in
evaluation mode. They are computed only where attributes differ: numbers, tensors, arrays, and collections of these.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import islice
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_train import trees
from dist_train.data.loader import seed_everything
from dist_train.distributed.world import World
from dist_train.errors import SetupError
from dist_train.training.digests import digest, number_of
from dist_train.trees import Tree

_OF_TORCH = frozenset(vars(nn.Module()))
_ROUNDING = 1e-3  # of the largest output: machines of different kinds round differently
_LARGEST = 1000  # parts of a collection that are compared
_SHOWN = 3


def fingerprint(model: nn.Module, device: torch.device) -> Tensor:
    """Returns a hash of all plain attributes, int64 []."""
    texts, total = [], torch.zeros((), dtype=torch.int64, device=device)
    for name, value in _attributes(model):
        if isinstance(value, Tensor):
            place = number_of(f"{name} {value.dtype} {list(value.shape)}")
            total = total + (digest(value).to(device) + place) * (2 * place + 1)
        else:
            texts.append(f"{name} {value!r}")
    return total + number_of("\n".join(texts))


@torch.no_grad()
def require_same_outputs(world: World, model: nn.Module, when: str, example: Tree) -> None:
    """Compares the outputs of a copy of the model, in evaluation mode, for the same random inputs. Collective.

    Args:
        when: names the moment in the message, such as "after step 3".
        example: inputs [B, ...] of the model's shape on its device; values of floats do not matter.

    Raises:
        SetupError: on every rank, if the outputs differ; names the attributes.
    """
    outputs = _outputs(model, example)
    sizes = world.gather(None if outputs is None else outputs.numel())
    if outputs is None or len(set(sizes)) > 1:
        return  # the model cannot be copied, or takes no such inputs: nothing can be said
    largest, smallest = world.all_reduce(torch.stack([outputs, -outputs]), "max")
    if bool(((largest + smallest).abs() <= _ROUNDING * largest.abs().max()).all()):
        return
    everyone = world.gather({name: _text(value) for name, value in _attributes(model)})
    names = sorted({name for own in everyone for name in own if len({each.get(name) for each in everyone}) > 1})
    more = f"; so do {len(names) - 1} more: {', '.join(names[1 : 1 + _SHOWN])}" if len(names) > 1 else ""
    raise SetupError(
        f"the attribute {names[0]} differs between ranks {when}, and the model's outputs for the same inputs with it: "
        f"it follows each rank's own data, and no checkpoint holds it{more}",
        "a running mean of rows: register_buffer under the name running_mean or running_var, which is averaged over "
        "the ranks and saved; otherwise leave it out, or train on one process",
    )


def _outputs(model: nn.Module, example: Tree) -> Tensor | None:
    """Returns the outputs, float64 [N], of a copy of the model; None where it cannot be copied or called."""
    generator = torch.Generator().manual_seed(0)
    inputs = trees.map_leaves(lambda leaf: _drawn(leaf, generator), example)
    # A tensor with a history cannot be copied, so its values are.
    memo: dict[int, Any] = {
        id(value): value.detach().clone() for _, value in _attributes(model) if isinstance(value, Tensor)
    }
    try:
        copied = copy.deepcopy(model, memo).eval()
        seed_everything(0)
        outputs = trees.plain(trees.call(copied, inputs))
    except Exception:  # of the model's own code
        return None
    leaves = [leaf for leaf in trees.leaves(outputs) if isinstance(leaf, Tensor)]
    return torch.cat([leaf.double().flatten().nan_to_num() for leaf in leaves]) if leaves else None


def _drawn(leaf: Tensor, generator: torch.Generator) -> Tensor:
    """Returns random floats in the place of floats; integers, which may be indices, stay."""
    if not leaf.is_floating_point():
        return leaf
    return torch.rand(leaf.shape, generator=generator).to(leaf.device)


def _attributes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields names and values of attributes that are no parameters or buffers: numbers, and dense tensors."""
    known = {id(each) for each in (*model.parameters(), *model.buffers())}
    for place, module in model.named_modules():
        if type(module).__module__.startswith("dist_train."):
            continue  # fake quantization keeps the rank's ranges of a step, which are merged
        for key, value in vars(module).items():
            if key not in _OF_TORCH:
                for inner, part in _parts(value):
                    if id(part) not in known:
                        yield f"{place}.{key}{inner}".removeprefix("."), part


def _parts(value: Any, deep: bool = True) -> Iterator[tuple[str, Any]]:
    """Yields numbers and tensors of a value, or of a collection's first ones, each with its place in the collection."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
    if isinstance(value, Number) or (isinstance(value, Tensor) and _plain(value)):
        yield "", value
    elif deep and isinstance(value, (list, tuple, deque, Mapping)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for place, each in islice(items, _LARGEST):
            yield from ((f"[{place!r}]", part) for _, part in _parts(each, deep=False))


def _plain(tensor: Tensor) -> bool:
    dense = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested
    return type(tensor) in (Tensor, nn.Parameter) and dense and tensor.device.type != "meta"


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} {int(digest(value))}"
    return repr(value)
