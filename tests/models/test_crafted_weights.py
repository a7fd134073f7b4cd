"""A file of weights that was made to take all memory is refused by its directory and its header."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from dist_train.errors import DataError
from dist_train.models.weight_files import read_file
from tests.support.crafted import MOST_MEGABYTES, inflated, refusal

READ = "from pathlib import Path; from dist_train.models.weight_files import read_file"


def _edited(path: Path, old: bytes, new: bytes) -> Path:
    """Writes a file of torch.save whose pickle was edited by hand."""
    torch.save({"w": torch.zeros(10, 10)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            assert old in data or not name.endswith("data.pkl")
            archive.writestr(name, data.replace(old, new, 1) if name.endswith("data.pkl") else data)
    return path


def _integer(value: int) -> bytes:
    return b"J" + value.to_bytes(4, "little")


def test_a_bomb_is_refused_by_its_directory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    inflated(path, "bomb/data/0", 2**30)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("bomb/data.pkl", b"\x80\x02}.")
    assert path.stat().st_size < 2 * 2**20
    found = refusal(READ, "read_file(Path(sys.argv[1]))", path)
    assert found.kind == "DataError" and "its files would have 1 GiB, and the archive has" in found.text
    assert found.megabytes < MOST_MEGABYTES


def test_a_compressed_part_and_a_long_pickle_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "packed.pt", "w") as archive:
        archive.writestr("packed/data.pkl", b"\x80\x02}.")
        archive.writestr("packed/padding", bytes(1000))
        archive.writestr("packed/data/0", bytes(1000), zipfile.ZIP_DEFLATED)
        archive.comment = bytes(3000)
    with pytest.raises(DataError, match="'packed/data/0' in it is compressed"):
        read_file(tmp_path / "packed.pt")
    torch.save({"w": torch.zeros(2), "names": "x" * (17 * 2**20)}, tmp_path / "long.pt")
    with pytest.raises(DataError, match="holds 17 MiB besides tensors, where 16 MiB are the most"):
        read_file(tmp_path / "long.pt")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"Kd", _integer(10**9)),  # more elements than the file of the tensor has, as in GHSA-63cw-57p8-fm3p
        (b"K\nK\n\x86", _integer(10**5) + _integer(10**5) + b"\x86"),  # a larger shape
        (b"K\nK\x01\x86", _integer(10**9) + b"K\x01\x86"),  # impossible strides
    ],
    ids=["elements", "shape", "strides"],
)
def test_sizes_that_do_not_fit_their_file_are_refused(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = _edited(tmp_path / "w.pt", old, new)
    found = refusal(READ, "read_file(Path(sys.argv[1]))", path)
    assert found.kind == "DataError"
    assert found.megabytes < MOST_MEGABYTES


@pytest.mark.parametrize(
    "header",
    [
        b'{"w":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,40]}}',
        b'{"w":{"dtype":"F32","shape":[10],"data_offsets":[0,4000000000000]}}',
        b'{"w":' + b"[" * 50_000 + b"}",
        b'{"w":7}',
        b'{"w":{"dtype":"F32","shape":[10],"data_offsets":7}}',
        b'{"w":' + b"9" * 5000 + b"}",
    ],
)
def test_headers_of_safetensors_that_lie_are_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(40))
    with pytest.raises(DataError, match="cannot read weights|is truncated"):
        read_file(path)
