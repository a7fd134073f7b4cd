"""Hashes tensors on their device, to compare them over ranks without moving them."""

from __future__ import annotations

import hashlib
from functools import cache

import torch
from torch import Tensor

_BLOCK = 2**16  # numbers that are hashed at once
_WORD = 8  # bytes of a number that is hashed


def number_of(text: str) -> int:
    """Returns a number of 62 bits for a text."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="backslashreplace")).digest()[:8], "little") >> 2


@torch.no_grad()
def digest(tensor: Tensor) -> Tensor:
    """Returns a hash of a dense tensor's bytes, int64 [] on its device: sums of words times odd random numbers."""
    data = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
    if data.storage_offset() % _WORD:
        data = data.clone()
    whole = len(data) // _WORD * _WORD
    factors, total = _factors(tensor.device), torch.zeros((), dtype=torch.int64, device=tensor.device)
    for words in (data[:whole].view(torch.int64), data[whole:]):
        for block in words.split(_BLOCK):
            total = total * 31 + (block * factors[: len(block)]).sum()
    return total


@cache
def _factors(device: torch.device) -> Tensor:
    """Returns _BLOCK random odd numbers, int64, the same on every rank; the global generator is left alone."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(2**61, (_BLOCK,), generator=generator) * 2 + 1).to(device)
