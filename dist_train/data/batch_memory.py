"""Memory of batches: rows that workers fill in shared memory, and buffers that are used again."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info


def new_rows(count: int, shape: Sequence[int], channels_last: bool) -> Tensor:
    """Returns memory for a batch, uint8 [count, *shape]: in a worker process shared, to be handed over as it is.

    channels_last: for images, the memory format in which the model takes them.

    Raises:
        RuntimeError, OSError: there is not enough shared memory.
    """
    if get_worker_info() is None:
        flat = torch.empty(count * prod(shape), dtype=torch.uint8)
    else:
        # As torch's own default_collate does; `share_memory_` would copy what is in an empty tensor.
        storage = torch.UntypedStorage._new_shared(count * prod(shape))
        flat = torch.empty(0, dtype=torch.uint8).set_(storage)
    if not (channels_last and len(shape) == 3):
        return flat.view(count, *shape)
    channels, height, width = shape
    return flat.view(count, height, width, channels).permute(0, 3, 1, 2)


class Buffers:
    """Memory for large tensors on the CPU, used again when nobody has a tensor of it any more.

    The system takes large memory back when a tensor is freed, and clears every page of the next one, which takes
    several times as long as filling it.
    """

    _KEPT = 2  # free buffers

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, count: int) -> Tensor:
        """Returns float32 [count], uninitialised."""
        fitting = next((buffer for buffer in self._free if len(buffer) >= count), None)
        if fitting is None:
            self._free.clear()  # too small
            fitting = torch.empty(count).numpy()
        else:
            self._free = [buffer for buffer in self._free if buffer is not fitting]
        lent = fitting[:count]
        # torch holds `lent` as long as there is a tensor of its memory, whoever has it.
        weakref.finalize(lent, self._give_back, fitting).atexit = False
        return torch.from_numpy(lent)

    def _give_back(self, buffer: np.ndarray) -> None:
        if len(self._free) < self._KEPT:
            self._free.append(buffer)
