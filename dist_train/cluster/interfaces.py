"""This machine's network interfaces, and the one at which gloo would listen."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Interface:
    """A network interface. `addresses`: IPv4, then IPv6 without link-local ones (fe80::)."""

    name: str
    up: bool
    addresses: tuple[str, ...]

    @property
    def reaches_others(self) -> bool:
        """True where another machine could connect to it."""
        return self.up and any(not is_loopback(address) for address in self.addresses)


def interfaces() -> list[Interface]:
    """Returns the interfaces of this machine, or of this network namespace."""
    states, addresses = psutil.net_if_stats(), psutil.net_if_addrs()
    found = []
    for name in dict.fromkeys([*states, *addresses]):  # one without an address may be in the first alone
        ipv4 = [each.address for each in addresses.get(name, []) if each.family == socket.AF_INET]
        ipv6 = [each.address for each in addresses.get(name, []) if each.family == socket.AF_INET6]
        state = states.get(name)
        # psutil's `isup` asks for a carrier too, its flags do not; an alias (eth0:1) has no state of its own.
        up = state is None or state.isup or "up" in state.flags.split(",")
        found.append(Interface(name, up, (*ipv4, *(each for each in ipv6 if not _is_link_local(each)))))
    return found


def _is_link_local(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_link_local


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def resolve(host: str) -> list[str]:
    """Returns the addresses of a host name, in the resolver's order.

    Raises:
        OSError: it has none, or no name server answers.
    """
    answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


def is_local(address: str) -> bool:
    """Tells whether this machine could listen at the address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def interface_of(host: str) -> str | None:
    """Returns the name of the interface that has this address of this machine; None where none has it.

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


def is_own(host: str) -> bool:
    """Tells whether `host` resolves to an address of this machine."""
    try:
        interface_of(host)
    except OSError:
        return False
    return True


def named_interfaces(environ: Mapping[str, str]) -> list[str]:
    """Returns the names in GLOO_SOCKET_IFNAME; none where it is not set or is empty, which is the same to gloo."""
    value = environ.get("GLOO_SOCKET_IFNAME", "")
    return value.split(",") if value else []


def gloo_address(environ: Mapping[str, str], present: Sequence[Interface]) -> str:
    """Returns the address at which gloo would listen, and which it gives to the other ranks.

    It is the address of the first interface in GLOO_SOCKET_IFNAME; "" where that has none. Without the variable it is
    the first address of the host name that this machine has; without such an address, the loopback address.
    Source: torch 2.14's ProcessGroupGloo.cpp, createDefaultDevice.
    """
    named = named_interfaces(environ)
    if named:
        addresses = next((each.addresses for each in present if each.name == named[0]), ())
        return addresses[0] if addresses else ""
    try:
        return next((address for address in resolve(socket.gethostname()) if is_local(address)), _LOOPBACK)
    except OSError:
        return _LOOPBACK
