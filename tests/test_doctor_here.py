"""The doctor on this machine: its own agents, folders and programs; what stands for a GPU's driver is a script."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dsllm.data.shards import MANIFEST_FILE, file_sha256
from dsllm.launch.doctor import host_side
from dsllm.launch.doctor.doctor import Wanted, examine
from dsllm.launch.doctor.facts import Facts
from dsllm.launch.doctor.needs import predict
from dsllm.launch.doctor.rendezvous import find_rendezvous
from dsllm.launch.doctor.software import PACKAGES
from dsllm.launch.hostfile import Host
from dsllm.launch.hosts import ANSWER_SECONDS, Hosts, on_this_machine
from dsllm.launch.launchers import TRAIN_SCRIPT
from dsllm.spec.load import load_spec
from dsllm.units import GIB
from tests.test_doctor import wrong


def test_agents_on_this_machine_find_a_rendezvous_and_leave_the_port():
    with Hosts(["a", "b"], on_this_machine) as hosts:
        for _ in range(2):
            rendezvous, findings = find_rendezvous(hosts, ["a", "b"], preferred_port=29517)
            assert wrong(findings) == []
            assert rendezvous is not None
            assert rendezvous.port == 29517
            assert not rendezvous.address.startswith("127.")


def test_one_host_meets_itself():
    with Hosts(["a"], on_this_machine) as hosts:
        rendezvous, _ = find_rendezvous(hosts, ["a"])
    assert rendezvous is not None
    assert (rendezvous.address, rendezvous.interfaces) == ("127.0.0.1", {"a": "lo"})


def test_this_machine_is_examined_without_ssh(tmp_path):
    wanted = Wanted((Host("here", 1),), load_spec("quickstart"), run_dir=tmp_path / "run")
    with Hosts(["here"], on_this_machine) as hosts:
        report = examine(hosts, wanted)
    assert report.is_ready, report.failed
    assert report.verdict == "here, ready"
    assert report.facts["here"].python == ".".join(str(part) for part in sys.version_info[:3])
    assert not (tmp_path / "run").exists()


def test_a_host_that_is_lost_does_not_keep_the_others_from_being_examined(tmp_path):
    def way(host: str, line: str) -> list[str]:
        return [
            "sh",
            "-c",
            line if host == "here" else "echo 'ssh: connect to host gone: Connection refused' >&2; exit 255",
        ]

    wanted = Wanted((Host("here", 1), Host("gone", 1)), run_dir=tmp_path / "run")
    with Hosts(["here", "gone"], way) as hosts:
        report = examine(hosts, wanted)
    assert list(report.failed) == ["gone"]
    assert report.healthy == ["here"]
    assert report.verdict == "gone: not ready: ssh: connect to host gone: Connection refused"


def test_facts_have_the_form_that_they_are_read_in():
    answer = host_side.facts(list(PACKAGES), str(TRAIN_SCRIPT.parent), None)
    facts = Facts.from_answer(answer)
    assert facts.versions["numpy"]
    assert asdict(facts)["dsllm_hash"] == host_side.sources_hash(str(TRAIN_SCRIPT.parent))


SMI = """#!/bin/sh
case $1 in
*compute-apps*) echo "GPU-1, 4711, 3072, /usr/bin/python, of bob" ;;
*) echo "0, GPU-0, NVIDIA A100-SXM4-80GB, 81920, 81000, 570.86"
   echo "1, GPU-1, NVIDIA A100-SXM4-80GB, 81920, 70000, 570.86"
   echo "2, GPU-2, NVIDIA A100-SXM4-80GB MIG, [N/A], [N/A], 570.86" ;;
esac
"""


def with_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> dict[str, Any]:
    """What is found where nvidia-smi is this script: no machine that tests run on has a GPU."""
    (tmp_path / "nvidia-smi").write_text(script)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return host_side.gpu_facts()


def test_the_driver_is_asked_for_gpus_and_their_processes(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = with_smi(tmp_path, monkeypatch, SMI)
    assert found["driver"] == "570.86"
    assert [(gpu["index"], gpu["free_bytes"] >> 20) for gpu in found["gpus"]] == [(0, 81000), (1, 70000)]
    (process,) = found["gpus"][1]["processes"]
    assert (process["pid"], process["used_bytes"]) == (4711, 3 * GIB)


@pytest.mark.parametrize(
    ("listed", "indices"),
    [("1", [1]), ("1,0", [1, 0]), ("GPU-1", [1]), ("", []), ("NoDevFiles", []), ("7", []), ("MIG-7f", [0, 1])],
)
def test_gpus_of_other_jobs_are_not_looked_at(tmp_path, monkeypatch, listed, indices):
    """A session within a job has CUDA_VISIBLE_DEVICES, also where no cgroup hides the others."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    found = with_smi(tmp_path, monkeypatch, SMI)
    assert [gpu["index"] for gpu in found["gpus"]] == indices
    assert found["driver_error"] is None


def test_a_driver_that_fails_or_hangs_is_quoted(tmp_path, monkeypatch):
    found = with_smi(tmp_path, monkeypatch, "#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert (found["gpus"], found["driver_error"]) == ([], "NVIDIA-SMI has failed")
    monkeypatch.setattr(host_side, "SMI_SECONDS", 0.2)
    found = with_smi(tmp_path, monkeypatch, "#!/bin/sh\nexec sleep 5\n")
    assert "timed out after 0.2 seconds" in found["driver_error"]


def test_a_host_has_time_to_ask_its_driver(tmp_path, monkeypatch):
    """Which takes eight GPUs without persistence mode more than 5 s for each of two questions."""
    asked = {}

    class Recording(Hosts):
        def ask_all(self, do, seconds=ANSWER_SECONDS, each=None, **arguments):
            asked[do] = seconds
            return super().ask_all(do, seconds, each, **arguments)

    with Recording(["here"], on_this_machine) as hosts:
        examine(hosts, Wanted((Host("here", 1),), run_dir=tmp_path / "run"))
    assert asked["facts"] > 2 * host_side.SMI_SECONDS >= 40


def test_a_manifest_has_the_hash_that_a_passport_has(tmp_path):
    (tmp_path / MANIFEST_FILE).write_text("{}")
    assert host_side.manifest(str(tmp_path)) == file_sha256(tmp_path / MANIFEST_FILE)
    assert host_side.manifest(str(tmp_path / "none")) is None


def test_a_file_left_in_a_new_folder_is_taken_away_with_the_folder(tmp_path):
    folder = tmp_path / "runs" / "new"
    left = host_side.leave_token(str(folder), "token")
    assert left["error"] is None
    assert host_side.see_tokens(str(folder), ["token", "other"]) == ["token"]
    host_side.remove_token(str(folder), "token")
    host_side.remove_made(left["made"])
    assert list(tmp_path.iterdir()) == []


def test_cuda_is_read_where_torch_keeps_it(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('it was imported')")
    (tmp_path / "torch" / "version.py").write_text("from typing import Optional\ncuda: Optional[str] = '12.8'\n")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        "from dsllm.launch.doctor import host_side; print(host_side.cuda_version())"
    )
    command = [sys.executable, "-c", script, tmp_path]
    assert subprocess.run(command, capture_output=True, text=True, cwd=TRAIN_SCRIPT.parent.parent).stdout == "12.8\n"


def test_the_prediction_is_that_of_the_engine():
    needs = predict(load_spec("quickstart"), 2, "cpu", "cpu", 8 * GIB)
    assert 0 < needs.peak_bytes < 8 * GIB
    assert needs.host_bytes == 0
