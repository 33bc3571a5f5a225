"""Whether each host has what its ranks need: GPUs or cores, memory, a clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsllm.launch.doctor.facts import Facts, GpuFacts
from dsllm.launch.doctor.finding import Check, Finding, Outcome, listed, usual
from dsllm.launch.doctor.needs import Needs
from dsllm.launch.hostfile import Host
from dsllm.units import GIB, format_bytes

SHARED_MEMORY_BYTES = GIB
"""NCCL passes through /dev/shm what GPUs of one host cannot pass directly; Docker gives 64 MiB where --shm-size does
not say otherwise, and NCCL's own guide asks for 1 GiB."""
CLOCK_WARNED_SECONDS = 5.0
CLOCK_FAILED_SECONDS = 30.0
"""Last words, logs and the newest checkpoint are put in order by time; make and NFS compare times too. NTP keeps hosts
within milliseconds, so seconds mean that it does not run, and half a minute turns the order of a failure around."""

SET_NTP = "timedatectl set-ntp true"


def judge_machines(
    facts: Mapping[str, Facts], hosts: Mapping[str, Host], needs: Needs | None, on_cpu: bool
) -> list[Finding]:
    """All checks of cores, GPUs and memory."""
    if on_cpu:
        of_each = [_cores(host, facts[host], hosts[host]) for host in facts]
    else:
        of_each = [finding for host in facts for finding in _gpus(host, facts[host], hosts[host])]
        of_each += _models(facts)
    return [*of_each, *(finding for host in facts for finding in _memory(facts[host], hosts[host], needs, on_cpu))]


@dataclass(frozen=True)
class Offset:
    """How far a clock is ahead of the launcher's, in seconds: within these two, as the question took its time."""

    least: float
    most: float

    @classmethod
    def seen(cls, before: float, there: float, after: float) -> Offset:
        """Of a clock that showed `there` between two moments of the launcher's."""
        return cls(there - after, there - before)

    def ahead_of(self, other: Offset) -> float:
        """Seconds that are certain; negative where it is behind, 0 where the two may agree."""
        return max(0.0, self.least - other.most) + min(0.0, self.most - other.least)

    def agrees_with(self, other: Offset) -> bool:
        return abs(self.ahead_of(other)) <= CLOCK_WARNED_SECONDS


def judge_clocks(offsets: Mapping[str, Offset]) -> list[Finding]:
    """A finding for each host, against the median of the hosts: logs and checkpoints are theirs.

    The launcher's clock counts where hosts are even in number, as of two it decides which is wrong. Where it agrees
    with none of them, that is a warning, for the first host as it has no row of its own.
    """
    launcher = Offset(0.0, 0.0)
    clocks = [*offsets.values(), *([launcher] if len(offsets) % 2 == 0 else [])]
    usual = sorted(clocks, key=lambda offset: offset.least + offset.most)[len(clocks) // 2]
    usual_host = next((host for host, offset in offsets.items() if offset.agrees_with(usual)), None)
    whose = "this machine's" if usual_host is None else f"{usual_host}'s"
    findings = [_clock(host, offset.ahead_of(usual), whose) for host, offset in offsets.items()]
    if usual_host is not None and not any(launcher.agrees_with(offset) for offset in offsets.values()):
        found = f"this machine's clock is {_apart(launcher.ahead_of(usual))} {whose}"
        findings.append(Finding(next(iter(offsets)), "clock", "warned", found, "let NTP keep it: " + SET_NTP))
    return findings


def _clock(host: str, ahead_seconds: float, whose: str) -> Finding:
    if abs(ahead_seconds) <= CLOCK_WARNED_SECONDS:
        return Finding(host, "clock", "passed", f"{ahead_seconds:+.0f} s" if round(ahead_seconds) else "0 s")
    outcome: Outcome = "failed" if abs(ahead_seconds) > CLOCK_FAILED_SECONDS else "warned"
    found = f"its clock is {_apart(ahead_seconds)} {whose}"
    return Finding(host, "clock", outcome, found, "let NTP keep it there: " + SET_NTP)


def _apart(ahead_seconds: float) -> str:
    return f"{abs(ahead_seconds):.0f} s {'ahead of' if ahead_seconds > 0 else 'behind'}"


def _cores(host: str, facts: Facts, wanted: Host) -> Finding:
    """On the CPU a rank needs a core."""
    found = f"no GPU; {_count(facts.cores, 'core')} for {_count(wanted.slots, 'slot')}"
    if facts.driver_error is not None:
        remedy = "mend the driver, or set DS_ACCELERATOR=cpu"
        return Finding(host, "GPUs", "failed", f"nvidia-smi: {facts.driver_error}", remedy)
    if facts.cores < wanted.slots:
        return Finding(host, "GPUs", "failed", found, f"lower its slots to {facts.cores} in the hostfile")
    return Finding(host, "GPUs", "passed", found)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _gpus(host: str, facts: Facts, wanted: Host) -> list[Finding]:
    """As many as slots, without anybody else on them."""
    if facts.driver_error is not None:
        remedy = "reboot it or reinstall the driver, or leave it out: --exclude " + host
        return [Finding(host, "GPUs", "failed", f"nvidia-smi: {facts.driver_error}", remedy)]
    if any(slot >= len(facts.gpus) for slot in wanted.slot_ids):
        return [_too_few(host, facts, wanted)]
    return [_shared_memory(host, facts, wanted), _processes(host, _used(facts, wanted))]


def _too_few(host: str, facts: Facts, wanted: Host) -> Finding:
    there, found, remedy = len(facts.gpus), "", "see whether its driver is installed"
    if facts.visible is not None:
        found, remedy = f" by CUDA_VISIBLE_DEVICES={facts.visible} there", "set it otherwise there, or not at all"
    found = _count(there, "GPU") + found
    if wanted.chosen is None:
        found += f" for {_count(wanted.slots, 'slot')}"
    else:
        found += f", without numbers {listed(str(slot) for slot in wanted.chosen if slot >= there)}"
    return Finding(host, "GPUs", "failed", found, f"lower its slots to {there} in the hostfile" if there else remedy)


def _used(facts: Facts, wanted: Host) -> list[GpuFacts]:
    """The GPUs that ranks will have."""
    return [facts.gpus[slot] for slot in wanted.slot_ids if slot < len(facts.gpus)]


def _shared_memory(host: str, facts: Facts, wanted: Host) -> Finding:
    found = f"{_count(len(facts.gpus), 'GPU')} for {_count(wanted.slots, 'slot')}"
    if wanted.slots > 1 and facts.shared_memory_bytes < SHARED_MEMORY_BYTES:
        found = f"/dev/shm has {format_bytes(facts.shared_memory_bytes)}, which NCCL may find too small"
        return Finding(host, "GPUs", "warned", found, "start the container with --shm-size=8g or --ipc=host")
    return Finding(host, "GPUs", "passed", found)


def _processes(host: str, gpus: list[GpuFacts]) -> Finding:
    """What else runs on them slows every rank of the run, and takes memory that no prediction knows of."""
    foreign = [(gpu, process) for gpu in gpus for process in gpu.processes]
    if not foreign:
        return Finding(host, "processes", "passed", "none on its GPUs")
    found = listed(
        f"{process.name} (process {process.pid}{f' of {process.user}' if process.user else ''}) "
        f"has {format_bytes(process.used_bytes)} of GPU {gpu.index}"
        for gpu, process in foreign
    )
    pids = " ".join(dict.fromkeys(str(process.pid) for _, process in foreign))
    return Finding(host, "processes", "failed", found, f"wait for it, or end it there: kill {pids}")


def _models(facts: Mapping[str, Facts]) -> list[Finding]:
    """The slowest GPU sets the pace, and the smallest decides what fits."""
    models = {host: " and ".join(sorted({gpu.name for gpu in one.gpus})) for host, one in facts.items() if one.gpus}
    if not models:
        return []
    value, most = usual(models)
    remedy = "the slowest sets the pace: leave it out with --exclude, or accept that"
    return [
        Finding(host, "GPUs", "warned", f"{own}; {most} has {value}", remedy)
        for host, own in models.items()
        if own != value or " and " in own
    ]


def _memory(facts: Facts, wanted: Host, needs: Needs | None, on_cpu: bool) -> list[Finding]:
    """Free memory against what the spec is predicted to take."""
    host = wanted.name
    if needs is None:
        return [Finding(host, "memory", "skipped", "no spec is given to predict from")]
    on_host = needs.host_bytes * wanted.slots
    if on_cpu:
        return [_host_memory(host, "memory", facts, on_host + needs.peak_bytes * wanted.slots)]
    used = _used(facts, wanted)
    of_gpus = [_gpu_memory(host, min(used, key=lambda gpu: gpu.free_bytes), needs)] if used else []
    return [*of_gpus, *([_host_memory(host, "host memory", facts, on_host)] if on_host else [])]


def _gpu_memory(host: str, gpu: GpuFacts, needs: Needs) -> Finding:
    found = f"{format_bytes(gpu.free_bytes)} of {format_bytes(gpu.memory_bytes)} free on GPU {gpu.index}"
    if gpu.free_bytes >= needs.peak_bytes:
        return Finding(host, "memory", "passed", f"{found}, predicted {format_bytes(needs.peak_bytes)}")
    remedy = "end what holds it" if gpu.memory_bytes >= needs.peak_bytes else needs.advice
    found = f"{found}; the run is predicted to need {format_bytes(needs.peak_bytes)}"
    return Finding(host, "memory", "failed", found, remedy)


def _host_memory(host: str, check: Check, facts: Facts, needed_bytes: int) -> Finding:
    found = f"{format_bytes(facts.available_bytes)} of the host's {format_bytes(facts.memory_bytes)} free"
    if facts.available_bytes >= needed_bytes:
        return Finding(host, check, "passed", f"{found}, predicted {format_bytes(needed_bytes)}")
    found = f"{found}; its ranks are predicted to need {format_bytes(needed_bytes)}"
    return Finding(host, check, "failed", found, "fewer slots there, a smaller model or batch, or less offloading")
