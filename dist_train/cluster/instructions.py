"""This machine's integer instructions, as far as results depend on them."""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path

WITHOUT_VNNI = "this CPU has no VNNI: runtimes add pairs of int8 products in 16 bits here, which overflow"
_X86 = ("x86_64", "amd64", "i686")
_VNNI = {"avx512_vnni", "avx_vnni", "avx_vnni_int8"}


def sums_overflow(cpuinfo: Path = Path("/proc/cpuinfo"), machine: str | None = None) -> bool:
    """True where runtimes' products of uint8 and int8 may overflow: on x86 without VNNI; False where nobody can tell.

    AVX2's and AVX-512's `vpmaddubsw` adds two products in int16 and saturates: 2 * 255 * 127 is above 32,767.

    Args:
        cpuinfo: the kernel's list of the CPU's flags; machine: as `platform.machine()`.
    """
    if (platform.machine() if machine is None else machine).lower() not in _X86:
        return False
    with suppress(OSError):
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("flags"):
                return not _VNNI & set(line.partition(":")[2].split())
    return False


def wrong_here(otherwise: str) -> str:
    """Returns the hint for an int8 model that a runtime computes otherwise on this machine; `otherwise` elsewhere."""
    if not sums_overflow():
        return otherwise
    return f"{WITHOUT_VNNI}; --qat.engine x86 in a new run keeps clear of that. If it was set: {otherwise}"
