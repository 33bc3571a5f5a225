"""Where hosts can meet, and which of their links are slow, from what each of them has tried."""

from __future__ import annotations

from typing import Any

import pytest

from dsllm.engine.links import rounds
from dsllm.launch.doctor.facts import Links, Pair
from dsllm.launch.doctor.link import judge_links
from dsllm.launch.doctor.measure import _ranks
from dsllm.launch.doctor.mesh import _blame
from dsllm.launch.doctor.rendezvous import Rendezvous, _judge, interface_variables
from dsllm.launch.hostfile import Host
from tests.test_doctor import wrong


def links(*pairs: tuple[str, str, float, float]) -> Links:
    return Links("gloo", 1e-4, 1e9, tuple(Pair(*pair) for pair in pairs), len(pairs))


def slow_hosts(found: Links) -> list[str]:
    hosts = sorted({host for pair in found.pairs for host in (pair.first, pair.second)})
    return [one[0] for one in wrong(judge_links(found, hosts, dict.fromkeys(hosts, "eth0")))]


def test_the_host_that_all_slow_pairs_share_is_to_blame():
    found = links(
        ("a", "b", 1e-4, 9e9),
        ("a", "c", 1e-4, 1e9),
        ("b", "c", 1e-4, 1e9),
        ("a", "d", 1e-4, 9e9),
        ("b", "d", 1e-4, 9e9),
        ("c", "d", 1e-4, 8e8),
    )
    assert slow_hosts(found) == ["c"]
    (finding,) = wrong(judge_links(found, list("abcd"), {"c": "eth7"}))
    assert finding[3] == "c - d: 800.0 MB/s, 0.10 ms; the median pair has 5.0 GB/s (3 pairs of it are slow)"
    assert "see the interface there (eth7) with ethtool" in finding[4]


def test_of_two_hosts_both_are_named_below_the_floors():
    assert slow_hosts(links(("a", "b", 1e-4, 99e6))) == ["a", "b"]
    assert slow_hosts(links(("a", "b", 11e-3, 1e9))) == ["a", "b"]
    assert slow_hosts(links(("a", "b", 9e-3, 101e6))) == []


@pytest.mark.parametrize("size", range(2, 12))
def test_a_tournament_has_every_pair_once_and_nobody_twice_in_a_round(size):
    played = list(rounds(size))
    assert len(played) == size - 1 + size % 2
    assert all(len({rank for game in games for rank in game}) == 2 * len(games) for games in played)
    assert sorted(game for games in played for game in games) == [
        (i, j) for i in range(size) for j in range(i + 1, size)
    ]


def reached(interface: str = "eth0", address: str = "10.0.0.2", peer: str = "10.0.0.1") -> dict[str, Any]:
    return {"error": None, "interface": interface, "address": address, "peer": peer}


def test_a_name_that_is_local_on_the_first_host_gives_way_to_its_address():
    """Debian's installer writes 127.0.1.1 for the own name into /etc/hosts."""
    tried = {
        "a": {"a": reached("lo", "127.0.1.1", "127.0.1.1"), "b": reached()},
        "172.17.0.1": {"a": reached("docker0"), "b": {"error": "Connection refused"}},
        "10.0.0.1": {"a": reached(address="10.0.0.1"), "b": reached()},
    }
    rendezvous, findings = _judge("a", 29500, tried)
    assert rendezvous is not None
    assert (rendezvous.address, rendezvous.port) == ("10.0.0.1", 29500)
    assert rendezvous.interfaces == {"a": "eth0", "b": "eth0"}
    assert wrong(findings) == []


def test_an_address_that_is_the_hosts_own_everywhere_is_none():
    tried = {"a": {"a": reached("lo", "::1", "::1"), "b": reached()}, "fd00::1": {"a": reached(), "b": reached()}}
    rendezvous, _ = _judge("a", 29500, tried)
    assert rendezvous is not None
    assert rendezvous.address == "10.0.0.1"


def test_a_name_is_kept_where_it_means_another_address_to_each_host():
    tried = {"a": {"a": reached(peer="10.0.0.1"), "b": reached(peer="192.168.0.1")}}
    rendezvous, _ = _judge("a", 29500, tried)
    assert rendezvous is not None
    assert rendezvous.address == "a"


def test_hosts_that_do_not_reach_the_best_address_are_named():
    tried = {
        "a": {"a": reached(), "b": {"error": "timed out"}, "c": {"error": "timed out"}},
        "10.0.0.1": {"a": reached(), "b": reached(), "c": {"error": "timed out"}},
    }
    rendezvous, findings = _judge("a", 29500, tried)
    assert rendezvous is None
    assert [one[:4] for one in wrong(findings)] == [
        ("c", "port", "failed", "cannot reach port 29500 of a (10.0.0.1): timed out")
    ]


def test_of_hosts_that_cannot_reach_each_other_the_common_one_is_to_blame():
    assert [one.host for one in _blame({("a", "b"): "timed out", ("c", "b"): "timed out"})] == ["b"]
    (inward,) = _blame({("a", "b"): "port 7: timed out"})
    assert (inward.host, inward.found) == ("b", "a cannot reach it (port 7: timed out)")
    (outward,) = _blame({("a", "b"): "port 7: timed out", ("a", "c"): "port 7: timed out"})
    assert (outward.host, outward.found) == ("a", "it cannot reach b, c (port 7: timed out)")


def test_gloo_and_nccl_are_told_one_interface_and_not_all_that_begin_like_it():
    """eth1 alone means eth10 too to NCCL; gloo knows no `=`."""
    rendezvous = Rendezvous("10.0.0.1", 29500, {"a": "eth1", "b": "ib0"}, {"a": "10.0.0.1", "b": "10.0.0.2"})
    assert interface_variables("eth1") == {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "=eth1"}
    ranks = _ranks([Host("a", 1), Host("b", 1), Host("c", 1)], rendezvous, on_cpu=True)
    told = [ranks[host]["environment"].get("NCCL_SOCKET_IFNAME") for host in "abc"]
    assert told == ["=eth1", "=ib0", None]
