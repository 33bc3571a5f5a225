"""Whether the hosts share the run's folder, can write to it, and have room and data for the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from dsllm.launch.doctor.facts import LAUNCHER, FolderFacts
from dsllm.launch.doctor.finding import Finding, listed, usual
from dsllm.launch.doctor.needs import Needs
from dsllm.plan.cost import room_for_checkpoints
from dsllm.units import format_bytes

LEAST_FREE_BYTES = 100 * 2**20
"""Logs and metrics of a run, where no spec says how large its checkpoints are."""


def judge_folder(folder: Path, found: Mapping[str, FolderFacts], needs: Needs | None) -> list[Finding]:
    """Of the run's folder on every host: writable, one and the same, and large enough."""
    shared = _shared(found)
    findings = []
    for host, one in found.items():
        if one.error is not None:
            findings.append(
                Finding(host, "folder", "failed", f"{folder} cannot be written: {one.error}", _remedy(one.error))
            )
        elif host in shared:
            findings.append(Finding(host, "folder", "passed", one.file_system))
        else:
            findings.append(_unshared(host, folder, one, next(iter(shared))))
        findings.append(_space(host, folder, one, needs))
    return findings


def judge_launcher(folder: Path, found: Mapping[str, FolderFacts], error: str | None) -> list[Finding]:
    """Whether the run's folder of the hosts is that of this machine too, where `dsllm launch` reads how far a run has
    come and appends to its history. `error` is why nothing can be written here. Only what fails is said."""
    remedy = "start from one of the hosts, mount the folder here, or give a shared one with --run-dir"
    if error is not None:
        words = f"{folder} cannot be written here, where dsllm launch keeps the run's history: {error}"
        return [Finding(host, "history", "failed", words, remedy) for host in _shared(found)]
    words = f"{folder} is not shared with this machine, where dsllm launch reads how far the run has come"
    unseen = [host for host in _shared(found) if LAUNCHER not in found[host].seen]
    return [Finding(host, "history", "failed", words, remedy) for host in unseen]


def _shared(found: Mapping[str, FolderFacts]) -> list[str]:
    """The hosts that see one folder, the most that do; those who see no file at all cannot write there."""
    counts = Counter(one.seen for one in found.values() if one.error is None)
    most = max(counts, key=lambda seen: counts[seen], default=())
    return [host for host, one in found.items() if one.error is None and one.seen == most]


def _unshared(host: str, folder: Path, one: FolderFacts, most: str) -> Finding:
    found = f"{folder} is not shared: what {most} writes is not seen there ({one.file_system})"
    remedy = f"mount the folder of {most} there (NFS or the like), or give a shared one with --run-dir"
    return Finding(host, "folder", "failed", found, remedy)


def _remedy(error: str) -> str:
    if "No space" in error or "quota" in error:
        return "make room there"
    if "Read-only" in error:
        return "mount it for writing"
    return "let this user write there (chown, chmod), or give another folder with --run-dir"


def _space(host: str, folder: Path, one: FolderFacts, needs: Needs | None) -> Finding:
    """Free bytes against the checkpoints that the run comes to keep."""
    free = f"{format_bytes(one.free_bytes)} free"
    if needs is None:
        if one.free_bytes < LEAST_FREE_BYTES:
            return Finding(host, "space", "failed", f"{free} in {folder}", "make room there")
        return Finding(host, "space", "passed", free)
    missing, needed_bytes = room_for_checkpoints(one.checkpoints, needs.checkpoint_bytes, needs.keep_last)
    if one.free_bytes < max(needed_bytes, LEAST_FREE_BYTES):
        found = (
            f"{free} in {folder}; the run comes to need {format_bytes(max(needed_bytes, LEAST_FREE_BYTES))}, "
            f"for {missing} checkpoints of {format_bytes(needs.checkpoint_bytes)}"
        )
        return Finding(host, "space", "failed", found, "make room there, or lower checkpoint.keep_last")
    return Finding(host, "space", "passed", f"{free}, forecast {format_bytes(needed_bytes)}")


def judge_data(folder: Path, manifests: Mapping[str, str | None], remote_kind: str | None) -> list[Finding]:
    """Of the tokens' manifest on every host, by its hash. `remote_kind` is a kind of source that the spec has and that
    no run prepares by itself."""
    there = {host: digest for host, digest in manifests.items() if digest is not None}
    if not there and remote_kind is not None:
        found = f"no tokens in {folder} yet, and no run prepares a {remote_kind} source by itself"
        return [Finding(host, "data", "failed", found, "dsllm data prepare, with this spec") for host in manifests]
    if not there:
        found = f"no tokens in {folder} yet; rank 0 prepares them at the start"
        return [Finding(host, "data", "warned", found, "dsllm data prepare does it before") for host in manifests]
    value, most = usual(there)
    remedy = f"copy {folder} of {most} there, or let it be shared"
    findings = []
    for host, digest in manifests.items():
        if digest == value:
            findings.append(Finding(host, "data", "passed", str(digest)[:8]))
            continue
        found = "no tokens" if digest is None else f"other tokens ({digest[:8]}, {most} has {str(value)[:8]})"
        findings.append(Finding(host, "data", "failed", f"{found} in {folder}", remedy))
    return findings


def judge_unprepared(folder: Path, found: Mapping[str, FolderFacts]) -> list[Finding]:
    """Of a folder that rank 0 will prepare tokens in: hosts that would not see them. Others are not mentioned."""
    shared = _shared(found)
    if not shared:
        return []
    unshared = [host for host, one in found.items() if one.error is None and host not in shared]
    words = f"no tokens in {folder} yet, and what {listed(shared[:1])} prepares would not be seen there"
    return [Finding(host, "data", "failed", words, f"let {folder} be shared") for host in unshared]
