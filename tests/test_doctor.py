"""What the doctor makes of what it is told: facts of hosts become findings, each with its remedy.

Nobody here has a GPU or a network of hosts: those facts are made up. Real hosts are in
tests/cluster/test_doctor_on_hosts.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsllm.cli.doctor import _selected
from dsllm.launch.doctor.doctor import Report
from dsllm.launch.doctor.facts import LAUNCHER, Facts, FolderFacts, GpuFacts, GpuProcess
from dsllm.launch.doctor.finding import Finding, listed
from dsllm.launch.doctor.machine import Offset, judge_clocks, judge_machines
from dsllm.launch.doctor.needs import Needs
from dsllm.launch.doctor.reach import unreachable
from dsllm.launch.doctor.software import judge_software
from dsllm.launch.doctor.storage import judge_data, judge_folder, judge_launcher, judge_unprepared
from dsllm.launch.hostfile import Host
from dsllm.launch.hosts import HostError
from dsllm.launch.topology import local_topology
from dsllm.units import GIB

A100 = GpuFacts(0, "NVIDIA A100-SXM4-80GB", 80 * GIB, 79 * GIB)
VERSIONS = {
    "torch": "2.13.0",
    "deepspeed": "0.19.8",
    "transformers": "5.23.0",
    "numpy": "2.4.0",
    "tokenizers": "0.23.0",
    "safetensors": "0.8.0",
    "CUDA": "12.8",
    "NCCL": "2.27.5",
}
FACTS = Facts(
    host_name="node",
    user="ada (1000)",
    python="3.11.7",
    executable="/env/bin/python",
    versions=VERSIONS,
    dsllm_version="0.1.0",
    dsllm_hash="aaaaaaaabbbb",
    spec_hash="ccccccccdddd",
    cores=64,
    memory_bytes=512 * GIB,
    available_bytes=500 * GIB,
    shared_memory_bytes=256 * GIB,
    driver="570.86",
    driver_error=None,
    gpus=tuple(replace(A100, index=index) for index in range(8)),
)
NEEDS = Needs(peak_bytes=40 * GIB, host_bytes=0, checkpoint_bytes=14 * GIB, keep_last=3, advice="see estimate-memory")
FOLDER = FolderFacts(None, 100 * GIB, "nfs4", 0, ("a", "b", "c"))


def three(**changed: Any) -> dict[str, Facts]:
    """Hosts a, b and c; what is given is so on b alone."""
    return {"a": FACTS, "b": replace(FACTS, **changed), "c": FACTS}


def wrong(findings: list[Finding]) -> list[tuple[str, str, str, str, str]]:
    """All that did not pass: host, check, outcome, what was found and the remedy."""
    return [(one.host, one.check, one.outcome, one.found, one.remedy) for one in findings if one.outcome != "passed"]


def of_machines(facts: Mapping[str, Facts], slots: int = 8, needs: Needs | None = NEEDS, on_cpu: bool = False):
    return wrong(judge_machines(facts, {name: Host(name, slots) for name in facts}, needs, on_cpu))


# Reach


@pytest.mark.parametrize(
    ("words", "status", "remedy"),
    [
        ("ssh: connect to host b port 22: Connection refused", 255, "start sshd there"),
        ("ssh: connect to host b port 22: No route to host", 255, "see that it is up, in this network"),
        ("ssh: connect to host b port 22: Connection timed out", 255, "or leave it out: --exclude b"),
        ("ssh: Could not resolve hostname b: Name or service not known", 255, "correct the name in the hostfile"),
        ("ada@b: Permission denied (publickey).", 255, "ssh-copy-id b"),
        ("Host key verification failed.", 255, "ssh b once by hand"),
        ("something new", 255, "see what ssh b true says"),
        ("sh: 1: cd: can't cd to /w{x}", 2, "make /w{x} there too, shared or copied"),
        ("bash: line 1: /env/python: No such file or directory", 127, "ranks are started with /env/python"),
        ("SyntaxError: future feature annotations is not defined", 1, "/env/python is too old"),
        ("no answer within 15 s", None, "or a file system hangs there (df)"),
    ],
)
def test_what_ssh_and_the_shell_say_has_a_remedy(words, status, remedy):
    finding = unreachable(HostError("b", words, status), "/w{x}", "/env/python")
    assert (finding.host, finding.outcome, finding.found) == ("b", "failed", words)
    assert remedy in finding.remedy


# Software


def test_hosts_that_run_the_same_pass():
    assert wrong(judge_software(three(), Path("my.yaml"))) == []


def test_another_python_fails_and_its_packages_are_not_judged():
    found = wrong(judge_software(three(python="3.12.1", versions={}), None))
    assert found == [
        ("b", "python", "failed", "Python 3.12.1; a has 3.11.7", "install Python 3.11.7 there as /env/bin/python"),
        ("b", "versions", "skipped", "another Python has its packages elsewhere", ""),
    ]


def test_another_micro_version_of_python_is_a_warning():
    assert [one[:3] for one in wrong(judge_software(three(python="3.11.9"), None))] == [("b", "python", "warned")]


@pytest.mark.parametrize(
    ("changed", "outcome", "found", "remedy"),
    [
        (
            {"torch": "2.6.0", "deepspeed": "0.16.0"},
            "failed",
            "torch 2.6.0, a has 2.13.0; deepspeed 0.16.0, a has 0.19.8",
            "there: pip install torch==2.13.0 deepspeed==0.19.8",
        ),
        ({"NCCL": "2.21.5"}, "failed", "NCCL 2.21.5, a has 2.27.5", "install there the build of torch that a has"),
        ({"CUDA": None}, "failed", "CUDA None, a has 12.8", "install there the build of torch that a has"),
        ({"numpy": "1.26.4"}, "warned", "numpy 1.26.4, a has 2.4.0", "there: pip install numpy==2.4.0"),
        (
            {"torch": None, "deepspeed": None},
            "failed",
            "torch, deepspeed not installed",
            "install dsllm[train] there into the Python of the ranks: /env/bin/python",
        ),
    ],
)
def test_another_version_of_a_package_is_named_with_the_usual_one(changed, outcome, found, remedy):
    facts = three(versions={**VERSIONS, **changed})
    assert wrong(judge_software(facts, None)) == [("b", "versions", outcome, found, remedy)]


def test_of_two_hosts_the_first_has_what_is_usual():
    facts = {"a": replace(FACTS, python="3.12.1"), "b": FACTS}
    assert [one[0] for one in wrong(judge_software(facts, None))] == ["b", "b"]


def test_sources_of_another_hash_fail_though_the_version_is_the_same():
    found = wrong(judge_software(three(dsllm_hash="eeeeeeeeffff"), None))
    remedy = "copy the dsllm of a there, or start from a folder that is shared"
    assert found == [("b", "dsllm", "failed", "dsllm 0.1.0 (eeeeeeee); a has 0.1.0 (aaaaaaaa)", remedy)]


def test_a_spec_that_most_hosts_lack_is_wanting_there():
    facts = {host: replace(FACTS, spec_hash=None if host != "a" else "ccccccccdddd") for host in "abc"}
    found = wrong(judge_software(facts, Path("my.yaml")))
    assert [one[0] for one in found] == ["b", "c"]
    assert found[0][3:] == ("my.yaml is not there", "copy my.yaml of a there, or use a shared folder")


# Machines


def test_hosts_with_what_their_ranks_need_pass():
    assert of_machines(three()) == []


def test_more_slots_than_gpus_fail():
    assert of_machines(three(gpus=FACTS.gpus[:4])) == [
        ("b", "GPUs", "failed", "4 GPUs for 8 slots", "lower its slots to 4 in the hostfile")
    ]


def test_a_host_without_gpus_among_others_fails():
    (found,) = of_machines(three(gpus=()))
    assert found[3:] == ("0 GPUs for 8 slots", "see whether its driver is installed")


def test_a_chosen_gpu_that_is_not_there_is_named():
    host = Host("a", 2, (1, 9))
    (found,) = wrong(judge_machines({"a": FACTS}, {"a": host}, None, on_cpu=False))[:1]
    assert found[3] == "8 GPUs, without numbers 9"


def test_slots_number_the_gpus_that_a_session_may_use():
    busy = replace(A100, index=5, processes=(GpuProcess(4711, "python", "bob (1001)", 3 * GIB),))
    facts = replace(FACTS, visible="4,5", gpus=(replace(A100, index=4), busy))
    assert [one[:3] for one in of_machines({"a": facts}, slots=1)] == []
    (found,) = of_machines({"a": facts}, slots=2)
    assert found[3] == "python (process 4711 of bob (1001)) has 3.00 GiB of GPU 5"
    (found,) = of_machines({"a": facts}, slots=4)
    assert found[3] == "2 GPUs by CUDA_VISIBLE_DEVICES=4,5 there for 4 slots"
    (found,) = of_machines({"a": replace(facts, visible="", gpus=())}, slots=4)
    assert found[4] == "set it otherwise there, or not at all"


def test_ranks_are_told_the_gpus_of_their_slots_where_something_limits_them():
    assert FACTS.devices(Host("a", 8)) is None
    assert FACTS.devices(Host("a", 2, (1, 3))) == "1,3"
    limited = replace(FACTS, visible="4, 5,GPU-6,7")
    assert limited.devices(Host("a", 4)) == "4,5,GPU-6,7"
    assert limited.devices(Host("a", 2, (0, 2))) == "4,GPU-6"


def test_on_this_machine_slots_number_what_is_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    assert _selected(local_topology(2, gpus=3)) == (Host("localhost", 2, (0, 1)),)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert _selected(local_topology(2, gpus=3)) == (Host("localhost", 2),)


def test_a_driver_that_fails_is_quoted():
    (found,) = of_machines(three(gpus=(), driver_error="Unable to determine the device handle for GPU"))
    assert found[:4] == ("b", "GPUs", "failed", "nvidia-smi: Unable to determine the device handle for GPU")
    assert "reboot" in found[4]


def test_another_model_of_gpu_is_a_warning():
    gpus = tuple(replace(gpu, name="NVIDIA A100-SXM4-40GB") for gpu in FACTS.gpus)
    (found,) = of_machines(three(gpus=gpus))
    assert found[2:4] == ("warned", "NVIDIA A100-SXM4-40GB; a has NVIDIA A100-SXM4-80GB")


def test_a_foreign_process_is_named_with_its_user():
    busy = replace(A100, processes=(GpuProcess(4711, "python", "bob (1001)", 3 * GIB),))
    (found,) = of_machines(three(gpus=(busy, *FACTS.gpus[1:])))
    assert found[1:] == (
        "processes",
        "failed",
        "python (process 4711 of bob (1001)) has 3.00 GiB of GPU 0",
        "wait for it, or end it there: kill 4711",
    )


def test_memory_that_something_holds_is_told_from_memory_that_is_not_there():
    gpus = (replace(A100, free_bytes=30 * GIB), *FACTS.gpus[1:])
    (held,) = of_machines(three(gpus=gpus))
    assert held[1:] == (
        "memory",
        "failed",
        "30.00 GiB of 80.00 GiB free on GPU 0; the run is predicted to need 40.00 GiB",
        "end what holds it",
    )
    (small,) = of_machines({"a": FACTS}, needs=replace(NEEDS, peak_bytes=90 * GIB))
    assert small[4] == "see estimate-memory"


def test_offloaded_states_are_counted_for_every_rank_of_a_host():
    (found,) = of_machines(three(available_bytes=100 * GIB), needs=replace(NEEDS, host_bytes=20 * GIB))
    assert found[:4] == (
        "b",
        "host memory",
        "failed",
        "100.00 GiB of the host's 512.00 GiB free; its ranks are predicted to need 160.00 GiB",
    )


def test_a_small_shared_memory_is_a_warning_where_ranks_share_a_host():
    facts = {"a": replace(FACTS, shared_memory_bytes=64 * 2**20)}
    (found,) = of_machines(facts)
    assert found[1:] == (
        "GPUs",
        "warned",
        "/dev/shm has 64.00 MiB, which NCCL may find too small",
        "start the container with --shm-size=8g or --ipc=host",
    )
    assert of_machines(facts, slots=1) == []


def test_on_the_cpu_ranks_need_cores_and_memory():
    facts = {"a": replace(FACTS, gpus=(), cores=2, available_bytes=GIB)}
    cores, memory = of_machines(facts, slots=4, on_cpu=True)
    assert cores[3:] == ("no GPU; 2 cores for 4 slots", "lower its slots to 2 in the hostfile")
    assert memory[1] == "memory"
    assert "its ranks are predicted to need 160.00 GiB" in memory[3]


def clocks(**seconds: float) -> list[tuple[str, str, str]]:
    """Host, outcome and words of what is found of clocks that are so far ahead of the launcher's."""
    found = judge_clocks({host: Offset(ahead, ahead + 0.01) for host, ahead in seconds.items()})
    assert [one.host for one in found][: len(seconds)] == list(seconds)
    return [(one.host, one.outcome, one.found) for one in found if one.outcome != "passed"]


@pytest.mark.parametrize(("ahead", "outcome"), [(0.4, None), (-4.9, None), (6, "warned"), (-31, "failed")])
def test_a_clock_is_judged_by_its_distance_to_the_others(ahead, outcome):
    assert [one[:2] for one in clocks(a=0, b=ahead, c=0)] == ([] if outcome is None else [("b", outcome)])


def test_what_the_way_may_have_taken_is_no_offset():
    here = Offset(0.0, 0.0)
    assert Offset.seen(100.0, 109.0, 110.0).ahead_of(here) == 0
    assert Offset.seen(100.0, 90.0, 110.0).ahead_of(here) == -10
    assert Offset.seen(100.0, 410.0, 110.0).ahead_of(here) == 300
    assert Offset(-10.0, 5.0).ahead_of(Offset(5.0, 20.0)) == 0


def test_a_clock_behind_is_told_from_one_ahead():
    assert clocks(a=0, b=-300, c=0) == [("b", "failed", "its clock is 300 s behind a's")]
    assert clocks(a=40, b=0, c=0) == [("a", "failed", "its clock is 40 s ahead of b's")]


def test_hosts_that_agree_are_ready_though_the_launchers_clock_is_off():
    warned = [("a", "warned", "this machine's clock is 300 s behind a's")]
    assert clocks(a=300, b=300.5) == warned
    assert clocks(a=300, b=300.5, c=300) == warned
    assert clocks(a=300) == warned


def test_of_two_clocks_that_of_the_launcher_decides_which_is_wrong():
    assert clocks(a=300, b=0) == [("a", "failed", "its clock is 300 s ahead of b's")]
    assert clocks(a=0, b=300) == [("b", "failed", "its clock is 300 s ahead of a's")]
    assert clocks(a=300, b=-300) == [
        ("a", "failed", "its clock is 300 s ahead of this machine's"),
        ("b", "failed", "its clock is 300 s behind this machine's"),
    ]


def test_of_a_launcher_that_is_off_with_its_host_only_the_host_is_told():
    assert clocks(a=0, b=300, c=300) == [("a", "failed", "its clock is 300 s behind b's")]


# Folders


def test_a_shared_folder_with_room_passes():
    assert wrong(judge_folder(Path("runs/x"), dict.fromkeys("abc", FOLDER), NEEDS)) == []


def test_a_folder_that_one_host_has_for_itself_is_not_shared():
    found = {
        "a": replace(FOLDER, seen=("a", "c")),
        "b": replace(FOLDER, seen=("b",)),
        "c": replace(FOLDER, seen=("a", "c")),
    }
    (finding,) = wrong(judge_folder(Path("runs/x"), found, NEEDS))
    assert finding[:4] == ("b", "folder", "failed", "runs/x is not shared: what a writes is not seen there (nfs4)")


def test_a_folder_that_the_launcher_does_not_see_fails_on_the_hosts_that_share_it():
    """It reads there how far the run has come, and appends to its history."""
    remedy = "start from one of the hosts, mount the folder here, or give a shared one with --run-dir"
    unseen = wrong(judge_launcher(Path("runs/x"), dict.fromkeys("abc", FOLDER), None))
    words = "runs/x is not shared with this machine, where dsllm launch reads how far the run has come"
    assert unseen == [(host, "history", "failed", words, remedy) for host in "abc"]
    seen = dict.fromkeys("abc", replace(FOLDER, seen=(LAUNCHER, *FOLDER.seen)))
    assert judge_launcher(Path("runs/x"), seen, None) == []
    (unwritable,) = wrong(judge_launcher(Path("runs/x"), {"a": FOLDER}, "Read-only file system"))
    assert unwritable[3:] == (
        "runs/x cannot be written here, where dsllm launch keeps the run's history: Read-only file system",
        remedy,
    )


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        ("Permission denied", "let this user write there"),
        ("Read-only file system", "mount it for writing"),
        ("Disk quota exceeded", "make room there"),
    ],
)
def test_a_folder_that_cannot_be_written_says_why(error, remedy):
    found = {"a": FOLDER, "b": replace(FOLDER, error=error, seen=("a",)), "c": FOLDER}
    (finding,) = wrong(judge_folder(Path("runs/x"), found, NEEDS))
    assert finding[3] == f"runs/x cannot be written: {error}"
    assert remedy in finding[4]


def test_room_is_wanted_for_one_checkpoint_more_than_are_kept_and_those_there_count():
    found = {"a": replace(FOLDER, free_bytes=50 * GIB)}
    (finding,) = wrong(judge_folder(Path("runs/x"), found, NEEDS))
    assert finding[3] == "50.00 GiB free in runs/x; the run comes to need 56.00 GiB, for 4 checkpoints of 14.00 GiB"
    assert finding[4] == "make room there, or lower checkpoint.keep_last"
    assert wrong(judge_folder(Path("runs/x"), {"a": replace(found["a"], checkpoints=1)}, NEEDS)) == []


def test_tokens_have_one_manifest_on_all_hosts():
    assert wrong(judge_data(Path("data/x"), dict.fromkeys("ab", "12345678"), "huggingface")) == []
    found = wrong(judge_data(Path("data/x"), {"a": "1" * 64, "b": None, "c": "2" * 64}, None))
    assert [one[:4] for one in found] == [
        ("b", "data", "failed", "no tokens in data/x"),
        ("c", "data", "failed", "other tokens (22222222, a has 11111111) in data/x"),
    ]


def test_tokens_that_are_nowhere_are_a_warning_where_all_hosts_will_see_them():
    remote = wrong(judge_data(Path("data/x"), dict.fromkeys("ab"), "huggingface"))
    assert [found for _, _, _, found, _ in remote] == [
        "no tokens in data/x yet, and no run prepares a huggingface source by itself"
    ] * 2
    findings = judge_data(Path("data/x"), dict.fromkeys("ab"), None)
    assert {one.outcome for one in findings} == {"warned"}
    assert "rank 0 prepares them at the start" in findings[0].found
    apart = {"a": replace(FOLDER, seen=("a",)), "b": replace(FOLDER, seen=("b",))}
    assert [one[:3] for one in wrong(judge_unprepared(Path("data/x"), apart))] == [("b", "data", "failed")]


# In all


def test_a_start_without_the_doctor_is_refused_only_where_ranks_cannot_start_or_meet():
    findings = (
        Finding("a", "clock", "failed", "its clock is wrong"),
        Finding("b", "port", "failed", "timed out"),
        Finding("c", "reach", "warned", "slow"),
        Finding("d", "reach", "failed", "refused"),
    )
    report = Report(tuple("abcd"), {}, findings, None)
    assert report.against(asks_doctor=True) == report.failed
    assert list(report.failed) == ["a", "b", "d"]
    assert report.against(asks_doctor=False) == {"b": [findings[1]], "d": [findings[3]]}


def test_a_long_list_of_hosts_is_cut_short():
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(number) for number in range(1000)]) == "0, 1, 2, 3, 4 and 995 more"


def test_of_a_thousand_hosts_only_those_with_something_to_say_are_shown(capsys):
    from dsllm.cli.doctor import print_report

    names = tuple(f"node-{number}" for number in range(1000))
    findings = tuple(
        Finding(name, "reach", "passed" if name != "node-7" else "failed", "", "start it") for name in names
    )
    print_report(Report(names, {}, findings, None))
    shown = capsys.readouterr().out
    assert "999 more hosts: ok" in shown
    assert shown.count("node-") == 3  # in the table, with its remedy, and in the verdict
