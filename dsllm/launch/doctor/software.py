"""Whether the hosts run the same: Python, the packages that ranks speak to each other with, dsllm, the spec."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dsllm.launch.doctor.facts import Facts
from dsllm.launch.doctor.finding import Check, Finding, Outcome, usual

NEEDED = ("torch", "deepspeed", "transformers")
SAME = (*NEEDED, "CUDA", "NCCL")
"""Ranks of different ones cannot talk, or compute different things."""
SIMILAR = ("numpy", "tokenizers", "safetensors")
"""Whose versions have agreed with each other so far."""
PACKAGES = (*NEEDED, *SIMILAR)
HASH_DIGITS = 8


def judge_software(facts: Mapping[str, Facts], spec_file: Path | None) -> list[Finding]:
    """All checks of what is installed. A host of another Python has its packages elsewhere: they are not judged."""
    usual_python = usual({host: _minor(one.python) for host, one in facts.items()})[0]
    comparable = {host: one for host, one in facts.items() if _minor(one.python) == usual_python}
    return [
        *_python(facts),
        *_versions(comparable),
        *(_skipped(host) for host in facts if host not in comparable),
        *_dsllm(facts),
        *(_spec(facts, spec_file) if spec_file is not None else []),
    ]


def _python(facts: Mapping[str, Facts]) -> list[Finding]:
    """Another minor version is another language to pickle and to C extensions; another micro version seldom matters."""
    value, most = usual({host: one.python for host, one in facts.items()})
    findings = []
    for host, one in facts.items():
        outcome: Outcome = "passed"
        if one.python != value:
            outcome = "warned" if _minor(one.python) == _minor(str(value)) else "failed"
        found = one.python if outcome == "passed" else f"Python {one.python}; {most} has {value}"
        remedy = "" if outcome == "passed" else f"install Python {value} there as {one.executable}"
        findings.append(Finding(host, "python", outcome, found, remedy))
    return findings


def _minor(version: str) -> str:
    """`3.11` of `3.11.7`."""
    return ".".join(version.split(".")[:2])


def _skipped(host: str) -> Finding:
    return Finding(host, "versions", "skipped", "another Python has its packages elsewhere")


def _versions(facts: Mapping[str, Facts]) -> list[Finding]:
    versions = {name: {host: one.versions.get(name) for host, one in facts.items()} for name in (*SAME, *SIMILAR)}
    others = {name: usual(by_host) for name, by_host in versions.items()} if facts else {}
    return [_versions_of(host, one, others) for host, one in facts.items()]


def _versions_of(host: str, facts: Facts, others: Mapping[str, tuple[str | None, str]]) -> Finding:
    """Against the usual version of each package, and a host that has it."""
    own = facts.versions
    missing = [name for name in NEEDED if own.get(name) is None]
    if missing:
        remedy = "install dsllm[train] there into the Python of the ranks: " + facts.executable
        return Finding(host, "versions", "failed", f"{', '.join(missing)} not installed", remedy)
    for names in (SAME, SIMILAR):
        unlike = [name for name in names if own.get(name) != others[name][0]]
        if unlike:
            outcome: Outcome = "failed" if names is SAME else "warned"
            found = "; ".join(f"{name} {own.get(name)}, {others[name][1]} has {others[name][0]}" for name in unlike)
            return Finding(host, "versions", outcome, found, _install(unlike, others))
    return Finding(host, "versions", "passed", f"torch {own['torch']}, deepspeed {own['deepspeed']}")


def _install(names: list[str], others: Mapping[str, tuple[str | None, str]]) -> str:
    """The pip command; CUDA and NCCL come with torch."""
    packages = [f"{name}=={others[name][0]}" for name in names if name in PACKAGES]
    if packages:
        return f"there: pip install {' '.join(packages)}"
    return f"install there the build of torch that {others[names[0]][1]} has"


def _dsllm(facts: Mapping[str, Facts]) -> list[Finding]:
    """Version and sources: a file that was changed on one host only has no version of its own."""
    sources = {host: _sources(one.dsllm_version, one.dsllm_hash) for host, one in facts.items()}
    return _alike("dsllm", sources, "dsllm", "copy the dsllm of {most} there, or start from a folder that is shared")


def _sources(version: str | None, digest: str | None) -> str | None:
    return None if digest is None else f"{version} ({digest[:HASH_DIGITS]})"


def _spec(facts: Mapping[str, Facts], spec_file: Path) -> list[Finding]:
    hashes = {host: one.spec_hash and one.spec_hash[:HASH_DIGITS] for host, one in facts.items()}
    return _alike("spec", hashes, str(spec_file), f"copy {spec_file} of {{most}} there, or use a shared folder")


def _alike(check: Check, values: Mapping[str, str | None], what: str, remedy: str) -> list[Finding]:
    """A finding for each host; one that lacks the thing fails even where most do."""
    value, most = usual({host: value for host, value in values.items() if value is not None} or values)
    findings = []
    for host, own in values.items():
        if own == value and own is not None:
            findings.append(Finding(host, check, "passed", own))
        else:
            found = f"{what} is not there" if own is None else f"{what} {own}; {most} has {value}"
            findings.append(Finding(host, check, "failed", found, remedy.replace("{most}", most)))
    return findings
