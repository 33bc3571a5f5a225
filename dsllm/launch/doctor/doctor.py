"""Examines every host of a launch at once, before its ranks start there."""

from __future__ import annotations

import contextlib
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsllm.launch.doctor import host_side
from dsllm.launch.doctor.facts import LAUNCHER, Facts, FolderFacts, Links
from dsllm.launch.doctor.finding import Check, Finding, failures, listed
from dsllm.launch.doctor.machine import Offset, judge_clocks, judge_machines
from dsllm.launch.doctor.measure import measure_links
from dsllm.launch.doctor.mesh import find_unreached
from dsllm.launch.doctor.needs import Needs, predict
from dsllm.launch.doctor.reach import unreachable
from dsllm.launch.doctor.rendezvous import PREFERRED_PORT, Rendezvous, find_rendezvous
from dsllm.launch.doctor.software import PACKAGES, judge_software
from dsllm.launch.doctor.storage import judge_data, judge_folder, judge_launcher, judge_unprepared
from dsllm.launch.hostfile import Host
from dsllm.launch.hosts import ANSWER_SECONDS, Agent, HostError, Hosts, on_this_machine
from dsllm.launch.launchers import TRAIN_SCRIPT
from dsllm.launch.topology import is_this_machine
from dsllm.plan.hardware import CPU
from dsllm.plan.model_shape import ModelShape
from dsllm.spec.derived import data_directory, remote_kind
from dsllm.spec.sections import Spec

TOKENS_LOOKED_FOR = 32
"""Hosts whose files each host looks for: enough to know which folder it sees."""
MEETING: tuple[Check, ...] = ("python", "versions", "dsllm", "port")
"""What has to be right for ranks to meet."""
REACHING: tuple[Check, ...] = ("reach", "port", "history")
"""What counts even where the doctor is not asked: without it no rank starts, none meets another, or the launch cannot
know how the run ended."""
FACTS_SECONDS = 2 * host_side.SMI_SECONDS + ANSWER_SECONDS
"""nvidia-smi is asked twice, and the rest is done at once."""


@dataclass(frozen=True)
class Wanted:
    """What the hosts are wanted for."""

    hosts: tuple[Host, ...]
    spec: Spec | None = None
    shape: ModelShape | None = None
    """Of its network, where no formula has it."""
    spec_file: Path | None = None
    """Where the spec is a file, rather than a preset: it has to be the same on every host."""
    run_dir: Path = Path("runs")
    on_cpu: bool | None = None
    """None: whether no host has a GPU."""
    port: int = PREFERRED_PORT
    folder: Path | None = None
    """Where ranks start, on every host; this one when absent."""

    @property
    def world_size(self) -> int:
        return sum(host.slots for host in self.hosts)


@dataclass(frozen=True)
class Report:
    """What was found on the hosts, in the order of the hostfile."""

    hosts: tuple[str, ...]
    facts: Mapping[str, Facts]
    """Of those that answered."""
    findings: tuple[Finding, ...]
    rendezvous: Rendezvous | None
    """None where not all hosts that answered reach one address."""
    seconds: float = 0.0
    on_cpu: bool = False
    links: Links | None = None
    """None in the quick part, and where they could not be measured."""

    @property
    def failed(self) -> dict[str, list[Finding]]:
        """All that stands against a start, by host."""
        return self.against(asks_doctor=True)

    def against(self, asks_doctor: bool) -> dict[str, list[Finding]]:
        """What stands against a start, by host; where the doctor is not asked (--no-doctor), only that its ranks could
        not be started, or not meet."""
        counted = (finding for finding in self.findings if asks_doctor or finding.check in REACHING)
        return failures(counted)

    @property
    def healthy(self) -> list[str]:
        """Hosts that nothing speaks against."""
        failed = self.failed
        return [host for host in self.hosts if host not in failed]

    @property
    def is_ready(self) -> bool:
        return not self.failed

    @property
    def verdict(self) -> str:
        """One line: `2 hosts, ready`, or the hosts that are not, and of one alone why."""
        if self.is_ready:
            return f"{f'{len(self.hosts)} hosts' if len(self.hosts) > 1 else self.hosts[0]}, ready"
        failed = self.failed
        first = next(iter(failed.values()))[0]
        why = f": {first.found}" if len(failed) == 1 else ""
        return f"{listed(failed)}: not ready{why}"


def examine(hosts: Hosts, wanted: Wanted, quick: bool = True) -> Report:
    """All checks of the hosts in `wanted`; `quick` leaves out the measurement of the links between them.

    Each question has its time limit, and a host that does not answer one is asked no other. Raises UserError where the
    spec's batch does not divide over the ranks.
    """
    started = time.monotonic()
    ward = Ward(hosts, wanted)
    facts = _look(ward)
    on_cpu = wanted.on_cpu if wanted.on_cpu is not None else not any(one.gpus for one in facts.values())
    needs = _needs(wanted, facts, on_cpu)
    ward.findings += judge_software(facts, wanted.spec_file) if facts else []
    ward.findings += judge_machines(facts, {host.name: host for host in wanted.hosts}, needs, on_cpu)
    _look_at_folders(ward, needs)
    rendezvous = None
    if ward.names:
        rendezvous, of_port = find_rendezvous(hosts, ward.names, wanted.port)
        ward.findings += of_port
        if rendezvous is not None and len(ward.names) > 1:
            ward.findings += find_unreached(hosts, rendezvous.own_addresses)
    links = None if quick else _look_at_links(ward, rendezvous, on_cpu)
    order = {host.name: number for number, host in enumerate(wanted.hosts)}
    return Report(
        hosts=tuple(host.name for host in wanted.hosts),
        facts=facts,
        findings=tuple(sorted(ward.findings, key=lambda finding: order[finding.host])),
        rendezvous=rendezvous,
        seconds=time.monotonic() - started,
        on_cpu=on_cpu,
        links=links,
    )


class Ward:
    """The hosts that still answer, and what was found so far."""

    def __init__(self, hosts: Hosts, wanted: Wanted) -> None:
        self.hosts = hosts
        self.wanted = wanted
        self.names = [host.name for host in wanted.hosts]
        self.findings: list[Finding] = []

    def ask(
        self,
        check: Check,
        do: str,
        seconds: float = ANSWER_SECONDS,
        each: Mapping[str, Mapping[str, Any]] | None = None,
        **arguments: Any,
    ) -> dict[str, Any]:
        """The answers of those that answer; the others are found to fail `check`, and are not asked again."""
        named = each if each is not None else {name: {} for name in self.names}
        answers = self.hosts.ask_all(do, seconds, named, **arguments)
        return {name: answer for name, answer in answers.items() if not self.is_lost(check, answer)}

    def is_lost(self, check: Check, answer: Any) -> bool:
        """Whether that is none."""
        if not isinstance(answer, HostError):
            return False
        self.names.remove(answer.host)
        self.findings.append(unreachable(answer, str(self.wanted.folder or Path.cwd()), sys.executable, check))
        return True


def _look(ward: Ward) -> dict[str, Facts]:
    """Who answers, what time it is there, and what the hosts are."""
    for host in ward.ask("reach", "learn", source=_host_side()):
        ward.findings.append(Finding(host, "reach", "passed", ""))
    with ThreadPoolExecutor(max_workers=max(1, len(ward.names))) as threads:
        seen: dict[str, Any] = dict(
            zip(ward.names, threads.map(_offset, map(ward.hosts.agents.__getitem__, ward.names)), strict=True)
        )
    offsets = {host: offset for host, offset in seen.items() if not ward.is_lost("clock", offset)}
    ward.findings += judge_clocks(offsets) if offsets else []
    answers = ward.ask(
        "reach",
        "facts",
        FACTS_SECONDS,
        packages=list(PACKAGES),
        package_folder=str(TRAIN_SCRIPT.parent),
        spec=str(ward.wanted.spec_file) if ward.wanted.spec_file is not None else None,
    )
    return {host: Facts.from_answer(answer) for host, answer in answers.items()}


def _host_side() -> str:
    """The source of what an agent learns."""
    return Path(host_side.__file__).read_text(encoding="utf-8")


def _offset(agent: Agent) -> Offset | HostError:
    """How far the clock there is ahead of this machine's."""
    before = time.time()
    try:
        there = agent.ask("clock")
    except HostError as error:
        return error
    return Offset.seen(before, there, time.time())


def _needs(wanted: Wanted, facts: Mapping[str, Facts], on_cpu: bool) -> Needs | None:
    """Predicted for the smallest device among the hosts; None where there is no spec, or no device."""
    if wanted.spec is None:
        return None
    if on_cpu:
        sizes = [one.memory_bytes // host.slots for host in wanted.hosts if (one := facts.get(host.name)) is not None]
        return predict(wanted.spec, wanted.world_size, "cpu", CPU, min(sizes), wanted.shape) if sizes else None
    gpus = [gpu for one in facts.values() for gpu in one.gpus]
    smallest = min(gpus, key=lambda gpu: gpu.memory_bytes, default=None)
    if smallest is None:
        return None
    return predict(wanted.spec, wanted.world_size, "cuda", smallest.name, smallest.memory_bytes, wanted.shape)


# Folders


def _look_at_folders(ward: Ward, needs: Needs | None) -> None:
    """The run's folder, and the tokens'."""
    _look_at_run_folder(ward, needs)
    if ward.wanted.spec is None:
        return
    data = Path(data_directory(ward.wanted.spec))
    manifests = ward.ask("data", "manifest", folder=str(data))
    ward.findings += judge_data(data, manifests, remote_kind(ward.wanted.spec.data))
    if len(ward.names) > 1 and not any(manifests.values()):
        ward.findings += judge_unprepared(data, _look_at_folder(ward, data))


def _look_at_run_folder(ward: Ward, needs: Needs | None) -> None:
    """On every host, and from here, where that is another machine."""
    folder = ward.wanted.run_dir
    if all(map(is_this_machine, ward.names)):
        ward.findings += judge_folder(folder, _look_at_folder(ward, folder), needs)
        return
    token = _new_token()
    with _left_here(folder, token) as error:
        found = _look_at_folder(ward, folder, {token: LAUNCHER})
    ward.findings += [*judge_folder(folder, found, needs), *judge_launcher(folder, found, error)]


@contextlib.contextmanager
def _left_here(folder: Path, token: str) -> Iterator[str | None]:
    """A file of that name in the folder as this machine sees it, or why there is none; by an agent, as on the hosts,
    since a file system may hang here too."""
    with Hosts([LAUNCHER], on_this_machine) as launcher:
        agent = launcher.agents[LAUNCHER]
        try:
            agent.ask("learn", source=_host_side())
            left = agent.ask("leave_token", folder=str(folder), token=token)
        except HostError as error:
            yield error.words
            return
        try:
            yield left["error"]
        finally:
            with contextlib.suppress(HostError):
                agent.ask("remove_token", folder=str(folder), token=token)
                agent.ask("remove_made", made=left["made"])


def _new_token() -> str:
    return f".dsllm-doctor-{secrets.token_hex(8)}"


def _look_at_folder(ward: Ward, folder: Path, others: Mapping[str, str] | None = None) -> dict[str, FolderFacts]:
    """Every host leaves a file there, and looks for those of the others; nothing is left behind. `others` are files
    that they look for too, with whose they are."""
    tokens = {name: _new_token() for name in ward.names}
    named = {name: {"token": token} for name, token in tokens.items()}
    left = ward.ask("folder", "leave_token", each=named, folder=str(folder))
    written = {tokens[name]: name for name, answer in left.items() if answer["error"] is None}
    written = {**(others or {}), **written}
    seen = ward.ask("folder", "see_tokens", folder=str(folder), tokens=list(written)[:TOKENS_LOOKED_FOR])
    ward.ask("folder", "remove_token", each={name: named[name] for name in ward.names}, folder=str(folder))
    made = {name: {"made": left[name].pop("made")} for name in ward.names}
    ward.ask("folder", "remove_made", each=made)
    return {name: FolderFacts(**left[name], seen=tuple(written[token] for token in seen[name])) for name in ward.names}


def _look_at_links(ward: Ward, rendezvous: Rendezvous | None, on_cpu: bool) -> Links | None:
    """Between the hosts whose ranks could meet, where those are two or more."""
    if len(ward.wanted.hosts) < 2:
        return None
    unlike = {finding.host for finding in ward.findings if finding.check in MEETING and _is_bad(finding)}
    names = [name for name in ward.names if name not in unlike]
    if len(names) > 1 and (rendezvous is None or names != ward.names):
        rendezvous, _ = find_rendezvous(ward.hosts, names, ward.wanted.port)
    if rendezvous is None or len(names) < 2:
        why = "needs two hosts that run the same and reach one port"
        ward.findings += [Finding(name, "link", "skipped", why) for name in ward.names]
        return None
    measured = [host for host in ward.wanted.hosts if host.name in names]
    links, findings = measure_links(ward.hosts, measured, rendezvous, on_cpu)
    ward.findings += findings
    return links


def _is_bad(finding: Finding) -> bool:
    return finding.outcome in ("failed", "skipped")
