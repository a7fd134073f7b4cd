"""This machine's addresses, and the network interfaces that have them."""

from __future__ import annotations

import socket
from ipaddress import ip_address

import psutil

from dist_train.errors import SetupError


def interface_of(address: str) -> str | None:
    """The interface of this machine that has `address`, a number or a name; None for one that no interface lists.

    Raises:
        SetupError: it is not an address of this machine, or a name that does not resolve.
    """
    try:
        (*_, (number, *_)), *_ = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)
    except OSError as error:
        raise SetupError(f"--local-addr {address} does not resolve: {error.strerror}", _numbers()) from None
    with socket.socket(socket.AF_INET6 if ":" in number else socket.AF_INET) as probe:
        try:
            probe.bind((number, 0))
        except OSError:
            raise SetupError(f"--local-addr {address} is not an address of this machine", _numbers()) from None
    if ip_address(number).is_loopback:
        number = "127.0.0.1" if "." in number else "::1"  # what the interface lists of its network, 127.0.0.0/8
    return next((name for name, theirs in _addresses().items() if number in theirs), None)


def _addresses() -> dict[str, list[str]]:
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [item.address.partition("%")[0] for item in items if item.family in families]
        for name, items in psutil.net_if_addrs().items()
    }


def _numbers() -> str:
    shown = [f"{address} ({name})" for name, addresses in _addresses().items() for address in addresses]
    return f"--local-addr ADDR, one of {', '.join(shown)}"
