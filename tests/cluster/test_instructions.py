from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.cluster.instructions import sums_overflow

FLAGS = "processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu sse4_2 avx2{}\nbugs\t\t: none avx512_vnni\n"


@pytest.mark.parametrize(
    ("machine", "flags", "overflow"),
    [
        ("x86_64", "", True),
        ("AMD64", "", True),
        ("x86_64", " avx512f avx512_bf16", True),
        ("x86_64", " avx512_vnni", False),
        ("x86_64", " avx_vnni", False),
        ("x86_64", " avx_vnni_int8 amx_int8", False),
        ("aarch64", "", False),
    ],
)
def test_x86_without_vnni_overflows(machine: str, flags: str, overflow: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(FLAGS.format(flags))
    assert sums_overflow(tmp_path / "cpuinfo", machine) is overflow


@pytest.mark.parametrize("content", [None, "", "processor: 0\n"])
def test_where_the_kernel_does_not_tell_nothing_is_claimed(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "cpuinfo").write_text(content)
    assert not sums_overflow(tmp_path / "cpuinfo", "x86_64")
