"""Hosts for the tests of this folder; where this machine cannot have any, they are skipped with the reason."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from tests.cluster import namespaces
from tests.cluster.host import Host
from tests.cluster.isolation import why_not


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], namespaces.Cluster]]:
    """`cluster(num_hosts)`, the same each time that a module asks for so many hosts; they share every tmp_path."""
    if reason := why_not():
        pytest.skip(reason)
    made: dict[int, namespaces.Cluster] = {}
    with contextlib.ExitStack() as stack:

        def make(num_hosts: int) -> namespaces.Cluster:
            if num_hosts not in made:
                folder = tmp_path_factory.mktemp(f"{num_hosts}-hosts")
                shared = [tmp_path_factory.getbasetemp()]
                made[num_hosts] = stack.enter_context(namespaces.cluster(num_hosts, folder, shared))
            return made[num_hosts]

        yield make


@pytest.fixture(scope="module")
def pair(cluster: Callable[[int], namespaces.Cluster]) -> namespaces.Cluster:
    """Two hosts, host-a and host-b."""
    return cluster(2)


@pytest.fixture
def a(pair: namespaces.Cluster) -> Host:
    return pair.hosts[0]


@pytest.fixture
def b(pair: namespaces.Cluster) -> Host:
    return pair.hosts[1]
