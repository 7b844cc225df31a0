"""Network interfaces in gpt2 doctor: what a system tells, and which of them Gloo and NCCL take."""

import socket
import time
from pathlib import Path

import pytest

from engine.checks import network
from engine.checks.network import Interface

ETH = Interface("eth0", "up", 10_000, ["10.0.0.5", "fd00::5"])
IB = Interface("ib0", "up", 400_000, ["10.1.0.5"])
LO = Interface("lo", "up", None, ["127.0.0.1", "::1"])
DOCKER = Interface("docker0", "down", None, ["172.17.0.1"])
BRIDGE = Interface("docker1", "up", None, ["172.18.0.1"])
BARE = Interface("eth1", "up", 10_000, [])
ALL = [LO, ETH, BARE, IB, DOCKER]


@pytest.fixture
def sys_net(tmp_path, monkeypatch) -> Path:
    """A tree like /sys/class/net, of interfaces that do not exist here."""
    trees = {
        "wan0": {"operstate": "up", "flags": "0x1003", "speed": "25000"},
        "veth0": {"operstate": "up", "flags": "0x1003", "speed": "-1"},
        "off0": {"operstate": "down", "flags": "0x1002"},
        "loop0": {"operstate": "unknown", "flags": "0x9"},
        "quiet0": {"operstate": "unknown", "flags": "0x8"},
        "odd0": {"operstate": "", "flags": "many", "speed": "fast"},
        "empty0": {},
    }
    for name, files in trees.items():
        (tmp_path / "net" / name).mkdir(parents=True)
        for file, content in files.items():
            (tmp_path / "net" / name / file).write_text(content + "\n")
    (tmp_path / "net" / "empty0" / "operstate").mkdir()  # no file
    (tmp_path / "inet6").write_text(
        "fd000000000000000000000000000002 04 40 00 80     wan0\n"
        "fe8000000000000000fc00fffe000001 04 40 20 80     wan0\n"
        "00000000000000000000000000000001 01 80 10 80    loop0\n"
    )
    monkeypatch.setattr(network, "SYS", tmp_path / "net")
    monkeypatch.setattr(network, "IPV6", tmp_path / "inet6")
    monkeypatch.setattr(socket, "if_nameindex", lambda: list(enumerate(trees, 1)))
    return tmp_path


def test_state_speed_and_addresses_are_what_the_system_tells(sys_net):
    told = {each.name: (each.state, each.mbit_per_s, each.addresses) for each in network.interfaces()}
    assert told == {
        "wan0": ("up", 25_000, ["fd00::2"]),  # not the address of the link alone
        "veth0": ("up", None, []),
        "off0": ("down", None, []),
        "loop0": ("up", None, ["::1"]),
        "quiet0": ("down", None, []),
        "odd0": (None, None, []),
        "empty0": (None, None, []),
    }
    assert [str(each) for each in network.interfaces()][:2] == ["wan0: up, 25 Gbit/s, fd00::2", "veth0: up, no address"]


def test_a_system_that_tells_nothing_has_interfaces_of_unknown_state(sys_net, monkeypatch):
    monkeypatch.setattr(network, "SYS", sys_net / "nowhere")
    monkeypatch.setattr(network, "IPV6", sys_net)  # a directory
    assert {str(each) for each in network.interfaces()} >= {"wan0: state unknown, no address"}


def test_this_machine_s_own_interfaces_are_found_without_hardware_addresses():
    found = network.interfaces()
    assert [each.name for each in found] == [name for _, name in socket.if_nameindex()]
    assert Interface._fields == ("name", "state", "mbit_per_s", "addresses")
    if loopback := [each for each in found if each.name == "lo"]:
        assert "127.0.0.1" in loopback[0].addresses


@pytest.mark.parametrize(
    ("addresses", "names", "words"),
    [
        (["10.0.0.5"], ["eth0"], "eth0, since this host's name leads to 10.0.0.5"),
        (["192.168.9.9", "fd00::5"], ["eth0"], "eth0, since"),  # the first is another host's
        (["127.0.1.1"], ["lo"], "other hosts need GLOO_SOCKET_IFNAME"),
        ([], ["lo"], "leads to no address here"),
        (["192.168.9.9"], ["lo"], "leads to no address here"),
    ],
)
def test_gloo_takes_the_interface_of_the_host_s_name(addresses, names, words, monkeypatch):
    monkeypatch.setattr(network, "own_addresses", lambda: addresses)
    text, taken = network.gloo(ALL, {})
    assert taken == names
    assert words in text


def test_gloo_takes_what_its_variable_names():
    assert network.gloo(ALL, {"GLOO_SOCKET_IFNAME": "ib0"}) == ("ib0, as GLOO_SOCKET_IFNAME=ib0 asks", ["ib0"])
    text, taken = network.gloo(ALL, {"GLOO_SOCKET_IFNAME": "eth"})  # whole names only
    assert (text, taken) == ("none: GLOO_SOCKET_IFNAME=eth names no interface of this host", [])


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        (None, ["ib0"]),
        ("eth", ["eth0"]),  # eth1 has no address
        ("=eth0", ["eth0"]),
        ("=eth", []),
        ("eth,ib", ["eth0", "ib0"]),
        ("^ib,lo", ["eth0"]),
        ("^=ib0", ["lo", "eth0"]),
        ("docker", []),  # it is down
    ],
)
def test_nccl_takes_what_its_documentation_says(asked, names):
    assert network.nccl(ALL, {} if asked is None else {"NCCL_SOCKET_IFNAME": asked})[1] == names


def test_nccl_takes_docker_and_the_loopback_only_where_nothing_else_is():
    assert network.nccl([LO, BRIDGE, ETH], {})[1] == ["eth0"]
    assert network.nccl([LO, BRIDGE, BARE], {})[1] == ["docker1"]
    assert network.nccl([LO, DOCKER], {})[1] == ["lo"]
    assert network.nccl([BARE], {}) == ("none has an address", [])


def test_a_name_server_that_does_not_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(network, "LONGEST_LOOKUP", 0.05)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(1) or [])
    began = time.monotonic()
    assert network.own_addresses() == []
    assert time.monotonic() - began < 0.9
