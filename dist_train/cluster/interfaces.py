"""This machine's network interfaces, and the one at which gloo would listen. Standard library only."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_IPV6 = Path("/proc/net/if_inet6")
_GET_FLAGS, _GET_ADDRESS = 0x8913, 0x8915  # Linux, include/uapi/linux/sockios.h
_UP = 0x1  # Linux, include/uapi/linux/if.h
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Interface:
    """`addresses`: its first IPv4 address, then those of IPv6; the ones on the link alone (fe80::) are left out."""

    name: str
    up: bool
    addresses: tuple[str, ...]

    @property
    def reaches_others(self) -> bool:
        """Whether another machine could connect to it."""
        return self.up and any(not is_loopback(address) for address in self.addresses)


def interfaces() -> list[Interface]:
    """The interfaces of this machine, or of this network namespace. Those of a system other than Linux have no addresses, and are up."""
    ipv6 = _ipv6_addresses()
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            flags = _ask(asked, _GET_FLAGS, name)
            address = _ask(asked, _GET_ADDRESS, name)
            ipv4 = [socket.inet_ntoa(address[20:24])] if address is not None else []
            up = flags is None or bool(struct.unpack_from("=H", flags, 16)[0] & _UP)
            found.append(Interface(name, up, (*ipv4, *ipv6.get(name, []))))
    return found


def _ask(asked: socket.socket, request: int, name: str) -> bytes | None:
    """The kernel's `struct ifreq` (netdevice(7)): 16 bytes of name, then the answer. None where it has no answer."""
    try:
        import fcntl  # not on Windows

        return fcntl.ioctl(asked.fileno(), request, struct.pack("256s", name.encode()[:15]))
    except (ImportError, OSError):
        return None


def _ipv6_addresses() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    with contextlib.suppress(OSError):  # no IPv6, or not Linux
        for line in _IPV6.read_text().splitlines():
            digits, *_, name = line.split()
            address = ipaddress.IPv6Address(bytes.fromhex(digits))
            if not address.is_link_local:
                found.setdefault(name, []).append(str(address))
    return found


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def resolve(host: str) -> list[str]:
    """The addresses of a host name, in the resolver's order.

    Raises:
        OSError: it has none, or no name server answers.
    """
    answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


def is_local(address: str) -> bool:
    """Whether this machine could listen at the address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def interface_of(host: str) -> str | None:
    """The name of the interface that has this address of this machine; None where none says so.

    Raises:
        OSError: the name does not resolve, or this machine could not listen at the address.
    """
    address = resolve(host)[0]
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
    if is_loopback(address) and family == socket.AF_INET:
        address = _LOOPBACK  # its interface has all of 127.0.0.0/8, and names this one
    return next((each.name for each in interfaces() if address in each.addresses), None)


def named_interfaces(environ: Mapping[str, str]) -> list[str]:
    """The names in GLOO_SOCKET_IFNAME; empty where it is not set, or is empty, which gloo takes for the same."""
    value = environ.get("GLOO_SOCKET_IFNAME", "")
    return value.split(",") if value else []


def gloo_address(environ: Mapping[str, str], present: Sequence[Interface]) -> str:
    """The address at which gloo would listen, and which it gives to the other ranks.

    That of the first interface in GLOO_SOCKET_IFNAME; else the first of the host name's that is one of this machine's; where there
    is none, the loopback address. "" where the interface's address cannot be found out. Read in torch 2.14's ProcessGroupGloo.cpp (createDefaultDevice), and seen.
    """
    named = named_interfaces(environ)
    if named:
        addresses = next((each.addresses for each in present if each.name == named[0]), ())
        return addresses[0] if addresses else ""
    try:
        return next((address for address in resolve(socket.gethostname()) if is_local(address)), _LOOPBACK)
    except OSError:
        return _LOOPBACK
