"""Whether the network between the hosts is one that a run can live with."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from dsllm.launch.doctor.facts import Links, Pair
from dsllm.launch.doctor.finding import Finding
from dsllm.units import format_text_bytes

LEAST_BYTES_PER_SECOND = 100e6
"""Gigabit Ethernet just has it. Below, the gradients of a model of 124M (250 MB in 16 bits) take seconds a step: no
cluster is meant to be so, and what is found is a wrong interface, a bad cable, or a VPN."""
MOST_LATENCY_SECONDS = 10e-3
"""Hosts of one data centre are below 1 ms apart. A ring of n hosts waits 2(n-1) times for each collective, and ZeRO-3
has several for each layer."""
SHARE_OF_MEDIAN = 1 / 3
"""A pair below that share of the median one is the exception, whatever the network: alike adapters differ by less."""
NUM_FOR_MEDIAN = 3
"""Pairs from which the median says what is usual."""
REMEDY = (
    "see the interface there ({interface}) with ethtool and ip -s link: its speed, duplex and errors; where another "
    "network joins the hosts, name its addresses in the hostfile"
)


def judge_links(links: Links, hosts: Sequence[str], interfaces: Mapping[str, str]) -> list[Finding]:
    """A finding for each host. Of a pair that is too slow the host is to blame that more such pairs have than the
    other's, else both are."""
    slow = [(pair, why) for pair in links.pairs if (why := _why_slow(pair, links.pairs)) is not None]
    times = Counter(host for pair, _ in slow for host in (pair.first, pair.second))
    blamed: dict[str, list[tuple[Pair, str]]] = {}
    for pair, why in slow:
        for host, other in ((pair.first, pair.second), (pair.second, pair.first)):
            if times[host] >= times[other]:
                blamed.setdefault(host, []).append((pair, why))
    return [_finding(host, links.pairs, blamed.get(host, []), interfaces.get(host, "?")) for host in hosts]


def worst_pair(pairs: Sequence[Pair]) -> Pair:
    """That of the least bandwidth."""
    return min(pairs, key=lambda pair: pair.bytes_per_second)


def _why_slow(pair: Pair, pairs: Sequence[Pair]) -> str | None:
    """What it is compared with, where it is too slow."""
    if pair.latency_seconds > MOST_LATENCY_SECONDS:
        return f"more than {MOST_LATENCY_SECONDS * 1e3:.0f} ms one way"
    if pair.bytes_per_second < LEAST_BYTES_PER_SECOND:
        return f"less than {_rate(LEAST_BYTES_PER_SECOND)}"
    usual = statistics.median(each.bytes_per_second for each in pairs)
    if len(pairs) >= NUM_FOR_MEDIAN and pair.bytes_per_second < SHARE_OF_MEDIAN * usual:
        return f"the median pair has {_rate(usual)}"
    return None


def _finding(host: str, pairs: Sequence[Pair], slow: list[tuple[Pair, str]], interface: str) -> Finding:
    if slow:
        pair, why = min(slow, key=lambda one: one[0].bytes_per_second)
        more = f" ({len(slow)} pairs of it are slow)" if len(slow) > 1 else ""
        return Finding(host, "link", "failed", f"{described(pair)}; {why}{more}", REMEDY.format(interface=interface))
    own = [pair for pair in pairs if host in (pair.first, pair.second)]
    if not own:
        return Finding(host, "link", "skipped", "the time did not suffice for its pairs")
    return Finding(host, "link", "passed", _rate(worst_pair(own).bytes_per_second))


def described(pair: Pair) -> str:
    """`host-a - host-b: 1.2 GB/s, 0.05 ms`."""
    return f"{pair.first} - {pair.second}: {_rate(pair.bytes_per_second)}, {pair.latency_seconds * 1e3:.2f} ms"


def summary(links: Links) -> str:
    """All-reduce over all hosts, and the worst pair, in a line."""
    measured = f"{len(links.pairs)} of {links.num_pairs} pairs" if len(links.pairs) < links.num_pairs else "pairs"
    return (
        f"all-reduce ({links.backend}): {_rate(links.bus_bytes_per_second)} bus bandwidth, "
        f"{links.all_reduce_latency_seconds * 1e3:.2f} ms; worst of the {measured}: "
        f"{described(worst_pair(links.pairs))}"
    )


def _rate(bytes_per_second: float) -> str:
    return f"{format_text_bytes(bytes_per_second)}/s"
