"""Network interfaces of this host, and those that Gloo and NCCL would take between hosts.

Linux tells state and speed in /sys/class/net. Hardware addresses are left out.
"""

import ipaddress
import os
import socket
import struct
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

SYS, IPV6 = Path("/sys/class/net"), Path("/proc/net/if_inet6")
GET_ADDRESS = 0x8915  # SIOCGIFADDR
IS_UP = 0x1  # IFF_UP
LONGEST_LOOKUP = 3.0  # seconds for the address of this host's own name


class Interface(NamedTuple):
    """A network interface. What the system does not tell is None."""

    name: str
    state: str | None  # "up", "down", or another word of Linux
    mbit_per_s: int | None
    addresses: list[str]  # IPv4, then IPv6 without those of the link alone

    def __str__(self) -> str:
        known = [self.state or "state unknown"]
        if self.mbit_per_s is not None:
            known.append(f"{self.mbit_per_s / 1000:g} Gbit/s")
        return f"{self.name}: " + ", ".join([*known, *(self.addresses or ["no address"])])


def interfaces() -> list[Interface]:
    """All interfaces, in the system's order."""
    try:
        names = [name for _, name in socket.if_nameindex()]
    except (OSError, AttributeError):
        names = sorted(os.listdir(SYS))
    return [Interface(name, _state(name), _speed(name), _addresses(name)) for name in names]


def gloo(found: list[Interface], environment: Mapping[str, str]) -> tuple[str, list[str]]:
    """(in words, names): the interface that Gloo takes, by GLOO_SOCKET_IFNAME or by this host's name."""
    if asked := environment.get("GLOO_SOCKET_IFNAME"):
        return _asked("GLOO_SOCKET_IFNAME", asked, [each for each in found if each.name in asked.split(",")])
    here = {address: each.name for each in found for address in each.addresses}
    for address in own_addresses():
        if ipaddress.ip_address(address).is_loopback:
            return f"lo, since this host's name leads to {address}; other hosts need GLOO_SOCKET_IFNAME", ["lo"]
        if address in here:
            return f"{here[address]}, since this host's name leads to {address}", [here[address]]
    return "lo, since this host's name leads to no address here; other hosts need GLOO_SOCKET_IFNAME", ["lo"]


def nccl(found: list[Interface], environment: Mapping[str, str]) -> tuple[str, list[str]]:
    """(in words, names): the interfaces that NCCL takes, by NCCL_SOCKET_IFNAME or in its documented order.

    That is ib*, then any but docker* and lo, then docker*, then lo. The variable holds the beginnings
    of names, after = whole names, after ^ those to leave out.
    """
    able = [each for each in found if each.addresses and each.state != "down"]
    if asked := environment.get("NCCL_SOCKET_IFNAME"):
        words = asked.removeprefix("^").removeprefix("=").split(",")
        is_exact, is_left_out = asked.lstrip("^").startswith("="), asked.startswith("^")

        def is_named(name: str) -> bool:
            return any(name == word if is_exact else name.startswith(word) for word in words)

        return _asked("NCCL_SOCKET_IFNAME", asked, [each for each in able if is_named(each.name) != is_left_out])
    names = [each.name for each in able]
    infiniband, docker, loopback = (
        [name for name in names if name.startswith(beginning)] for beginning in ("ib", "docker", "lo")
    )
    others = [name for name in names if name not in (*docker, *loopback)]
    chosen = infiniband or others or docker or loopback
    return (", ".join(chosen) or "none has an address", chosen)


def _asked(variable: str, value: str, chosen: list[Interface]) -> tuple[str, list[str]]:
    names = [each.name for each in chosen]
    if not names:
        return f"none: {variable}={value} names no interface of this host", []
    return f"{', '.join(names)}, as {variable}={value} asks", names


def own_addresses() -> list[str]:
    """Addresses that this host's name leads to; none if a server takes too long to say."""
    answers: list[str] = []

    def look() -> None:
        with suppress(OSError, UnicodeError):
            found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
            answers.extend(str(address[0]).partition("%")[0] for *_, address in found)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(LONGEST_LOOKUP)
    return list(answers)


# ---- Of one interface ---------------------------------------------------------------------------------------------


def _read(name: str, file: str) -> str | None:
    with suppress(OSError, ValueError):  # the speed of what is down is an error
        return (SYS / name / file).read_text().strip()
    return None


def _state(name: str) -> str | None:
    state = _read(name, "operstate")
    if state not in (None, "", "unknown"):
        return state
    with suppress(TypeError, ValueError):  # lo never tells its state
        return "up" if int(_read(name, "flags"), 16) & IS_UP else "down"
    return None


def _speed(name: str) -> int | None:
    with suppress(TypeError, ValueError):
        speed = int(_read(name, "speed"))
        return speed if speed > 0 else None  # -1: a virtual one
    return None


def _addresses(name: str) -> list[str]:
    found = []
    with suppress(OSError, ImportError, ValueError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        import fcntl

        answer = fcntl.ioctl(asked.fileno(), GET_ADDRESS, struct.pack("256s", os.fsencode(name)[:15]))
        found.append(socket.inet_ntoa(answer[20:24]))
    with suppress(OSError, ValueError):
        for line in IPV6.read_text().splitlines():
            digits, *_, of = line.split()
            address = ipaddress.IPv6Address(int(digits, 16))
            if of == name and not address.is_link_local:
                found.append(str(address))
    return found
