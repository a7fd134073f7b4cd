"""Small IDX files, the format of MNIST and Fashion-MNIST, written by the test that needs them."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np


def idx(array: np.ndarray) -> bytes:
    """Returns the bytes of an IDX file of uint8."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(size).to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_fashion_mnist(
    folder: Path, zipped: bool = True, train: int = 12, evaluation: int = 5
) -> dict[str, np.ndarray]:
    """Writes small files in Fashion-MNIST's format. Returns their arrays by name."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    content = {}
    for prefix, rows in (("train", train), ("t10k", evaluation)):
        content[f"{prefix}-images-idx3-ubyte"] = generator.integers(0, 256, (rows, 28, 28))
        content[f"{prefix}-labels-idx1-ubyte"] = generator.integers(0, 10, rows)
    for name, array in content.items():
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    return content
