"""`dsllm launch` before any rank starts: dry runs, refusals, job scripts. Ends are in test_cli_launch_ends.py."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from dsllm.launch import launchers
from tests.test_cli import ROOT, run

pytestmark = pytest.mark.usefixtures("plain_surroundings")

TRAIN = str(ROOT / "dsllm" / "train.py")
TWO_NODES = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NODELIST": "gpu[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "2",
}
FOUR_RANKS = ("--set", "batch.micro_batch_size=4")


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    path = tmp_path / "hosts"
    path.write_text("a slots=2\nb slots=2\n")
    return str(path)


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The lines that it prints; nothing else is said."""
    status, out, err = run(capsys, "launch", "quickstart", *arguments, "--dry-run")
    assert (status, err) == (0, "")
    return out.splitlines()


# --- dry runs --------------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_command_and_stops(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = dry_run(capsys, "--num-gpus", "2", "--run-dir", "my run", "--set", "seed=1")
    words = shlex.split(line)
    assert words[0] == "DS_ACCELERATOR=cpu"
    assert Path(words[1]).name == "deepspeed"
    assert words[2:6] == ["--num_gpus", "2", "--master_port", "29500"]
    assert words[6:8] == ["--log_level", "error"]
    assert words[8] == TRAIN
    assert words[9:] == ["--spec", "quickstart", "--run-dir", "my run", "--set", "seed=1"]


@pytest.mark.parametrize("launcher", ["local", "torchrun", "openmpi"])
def test_on_this_machine_every_launcher_is_one_command_without_a_private_file(
    capsys: pytest.CaptureFixture[str], launcher: str
) -> None:
    (line,) = dry_run(capsys, "--launcher", launcher, "--num-gpus", "2", "--master-port", "29555")
    assert shlex.split(line)[-3:] == [TRAIN, "--spec", "quickstart"]


@pytest.mark.parametrize(
    ("launcher", "commands"), [(None, 1), ("pdsh", 1), ("ssh", 2), ("torchrun", 2), ("openmpi", 1)]
)
def test_on_several_hosts_it_says_who_runs_which_ranks_and_is_told_what(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    hostfile: str,
    launcher: str | None,
    commands: int,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-1")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    chosen = ["--launcher", launcher] if launcher else []
    lines = dry_run(capsys, "--hostfile", hostfile, *chosen, *FOUR_RANKS)
    assert lines[commands:] == [
        "a: ranks 0 to 1",
        "b: ranks 2 to 3",
        f"told to every host, in a private file: {', '.join(sorted(['HF_TOKEN', 'NCCL_DEBUG', *_always()]))}",
        "address and port are settled, and GPUs looked for, when the hosts are asked",
    ]
    for line in lines[:commands]:
        assert "--environment-file /tmp/dsllm-LAUNCH/environment" in line
        assert "--set batch.micro_batch_size=4" in line
    assert "secret-1" not in "\n".join(lines)


def _always() -> list[str]:
    """What this test's own environment adds."""
    from dsllm.launch.environment import selected

    return [name for name in selected(os.environ) if name not in ("HF_TOKEN", "NCCL_DEBUG")]


def test_in_a_job_of_slurm_srun_starts_the_ranks_and_hands_the_environment_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in TWO_NODES.items():
        monkeypatch.setenv(name, value)
    line, *more = dry_run(capsys, *FOUR_RANKS)
    words = shlex.split(line)
    assert {"--ntasks=4", "--ntasks-per-node=2", "--nodelist=gpu1,gpu2"} <= set(words)
    assert words[-5:] == [TRAIN, "--spec", "quickstart", *FOUR_RANKS]
    assert more[:2] == ["gpu1: ranks 0 to 1", "gpu2: ranks 2 to 3"]
    assert more[2].startswith("told to every host: ")


def test_in_a_job_of_slurm_the_same_gpus_are_chosen_of_every_host(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**TWO_NODES, "SLURM_GPUS_ON_NODE": "4"}.items():
        monkeypatch.setenv(name, value)
    line, *_ = dry_run(capsys, "--include", "gpu1:1,3@gpu2:1,3", *FOUR_RANKS)
    assert "cut -s -d, -f2,4" in line
    status, out, err = run(capsys, "launch", "quickstart", "--include", "gpu1:0,1@gpu2:2,3", *FOUR_RANKS)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "given GPUs 0,1 of host 'gpu1' and 2,3 of 'gpu2'; must be the same of every host of a Slurm job" in err


def test_on_a_login_node_srun_starts_the_ranks_of_a_job_of_one_node_unless_they_are_wanted_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**TWO_NODES, "SLURM_JOB_NODELIST": "gpu1", "SLURM_JOB_NUM_NODES": "1"}.items():
        monkeypatch.setenv(name, value)
    line, *_ = dry_run(capsys)
    assert {"--ntasks=2", "--nodelist=gpu1"} <= set(shlex.split(line))
    (line,) = dry_run(capsys, "--launcher", "local", "--num-gpus", "2")
    assert "srun" not in line


def test_a_thousand_hosts_are_planned(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"worker-{number:04} slots=8\n" for number in range(1000)))
    sizes = ["--set", "batch.global_batch_size=16000", "--set", "batch.micro_batch_size=2"]
    command, *lines = dry_run(capsys, "--hostfile", str(hostfile), "--launcher", "pdsh", *sizes)
    ranks = [line for line in lines if ": ranks " in line]
    assert f"--hostfile {hostfile} --launcher pdsh" in command
    assert len(ranks) == 1000
    assert ranks[-1] == "worker-0999: ranks 7992 to 7999"
    first, rest, *_ = dry_run(capsys, "--hostfile", str(hostfile), "--launcher", "ssh", *sizes)
    assert "--node_rank=0" in first
    assert rest == "… and so on for 999 more hosts, each with its node rank"
    fewer = dry_run(capsys, "--hostfile", str(hostfile), "--num-nodes", "500", "--launcher", "openmpi", *sizes)
    assert "mpirun -np 4000 --host worker-0000:8," in fewer[0]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hostfile", "nothing"], "nothing: there is no such hostfile"),
        (["--num-gpus", "3"], "batch.global_batch_size: given 16; micro_batch_size 8 on 3 ranks takes 24 sequences"),
        (["--resume", "nothing"], "--resume: given 'nothing'; there is no such path; must be auto, never or a"),
        (["--num-nodes", "2"], "--num-nodes: given 2 without a hostfile; add --hostfile"),
        (["--include", "a"], "--include: given a without a hostfile; add --hostfile, which names the hosts"),
        (["--exclude", "a"], "--exclude: given a without a hostfile; add --hostfile, which names the hosts"),
        (["--set", "zero.stage=7"], "quickstart: zero.stage: given 7"),
        (["--stop-after", "soon"], "--stop-after: given 'soon'; must be a time such as 90s, 45m, 3h50m or 1d2h"),
        (["--launcher", "magic"], "--launcher: given 'magic'; must be one of local, pdsh, ssh, slurm, openmpi, torchr"),
        (["--launcher", "pdsh"], "--launcher: given pdsh for this machine alone; add --hostfile"),
        (["--launcher", "ssh"], "--launcher: given ssh for this machine alone; add --hostfile"),
        (["--launcher", "slurm"], "SLURM_JOB_NODELIST: not set; start it inside a job of Slurm, with sbatch or salloc"),
        (["--min-hosts", "2"], "--min-hosts: given 2; the launch has 1; must be as many or fewer"),
    ],
)
def test_a_launch_that_cannot_work_is_refused_before_it_starts(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    status, out, err = run(capsys, "launch", "quickstart", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"dsllm: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("launcher", ["openmpi", "torchrun"])
def test_in_a_job_of_several_nodes_no_launcher_starts_on_this_one_alone(
    launcher: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in TWO_NODES.items():
        monkeypatch.setenv(name, value)
    status, _, err = run(capsys, "launch", "quickstart", "--launcher", launcher)
    assert status == 2
    assert err.startswith(f"dsllm: --launcher: given {launcher} in a Slurm job without a hostfile, which would be this")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["launch"], "launch: given 0 specs; name one, as in dsllm launch quickstart"),
        (["launch", "quickstart", "--spec", "1b"], "launch: given 2 specs; name one, as in dsllm launch quickstart"),
        (["doctor", "quickstart", "--spec", "1b"], "doctor: given 2 specs; name one, as in dsllm doctor quickstart"),
    ],
)
def test_one_spec_is_named_and_no_other(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert run(capsys, *arguments) == (2, "", f"dsllm: {message}\n")


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", [], "the hostfile lists no host; add a line such as `worker-1 slots=8`"),
        ("a slots=0\n", [], "line 1: given slots=0; must be at least 1; remove the line to leave the host out"),
        ("a\n", [], "given 'a'; a line is a name and its slots, such as `worker-1 slots=8`"),
        ("a slots=1\nA slots=1\n", [], "line 2: host 'A' is listed twice; add its slots up in one line"),
        ("a slots=1\nb slots=1\n", ["--include", "c"], "c"),
        ("a slots=1\nb slots=1\n", ["--include", "a:1"], "a"),
        ("a slots=1\nb slots=1\n", ["--exclude", "a@b"], "--exclude"),
        ("a slots=1\nb slots=1\n", ["--include", "a", "--exclude", "b"], "--include"),
        ("a slots=1\nb slots=1\n", ["--num-gpus", "2"], "--num-gpus: given 2; host 'a' of"),
        ("a slots=1\nb slots=1\n", ["--num-nodes", "3"], "--num-nodes: given 3;"),
        ("a slots=1\nb slots=1\n", ["--min-hosts", "3"], "--min-hosts: given 3; the launch has 2; must be as many or"),
        ("a slots=1\nb slots=1\n", ["--launcher", "local"], "--launcher: given local, which starts ranks on this mac"),
        (
            "a slots=1\nb slots=1\n",
            ["--launcher", "slurm"],
            "--launcher: given slurm with a hostfile; leave --hostfile",
        ),
        ("localhost slots=1\n", ["--launcher", "slurm"], "--launcher: given slurm with a hostfile; leave --hostfile"),
        (
            "a slots=1\nfe80::1 slots=1\n",
            ["--launcher", "openmpi", "--dry-run"],
            "--launcher: given openmpi, which takes no IPv6 address such as fe80::1 for a host",
        ),
        ("a slots=2\nb slots=1\n", [], "hosts with different slots (a 2, b 1) need one number of ranks; add --num-gpu"),
    ],
)
def test_a_hostfile_or_a_choice_of_hosts_that_cannot_work_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, arguments: list[str], message: str
) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text(text)
    status, out, err = run(capsys, "launch", "quickstart", "--hostfile", str(hostfile), *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("dsllm: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_launcher_that_is_not_installed_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, hostfile: str
) -> None:
    monkeypatch.setattr(launchers.shutil, "which", lambda name: None)
    for launcher in ("pdsh", "openmpi"):
        status, _, err = run(
            capsys, "launch", "quickstart", "--hostfile", hostfile, "--launcher", launcher, *FOUR_RANKS
        )
        assert (status, err.count("\n")) == (2, 1)
        assert f"--launcher: given {launcher}" in err


def test_an_automatic_micro_batch_still_needs_a_batch_that_divides(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "launch", "gpt2-124m", "--num-gpus", "3", "--dry-run")
    assert status == 2
    assert "given 512; micro_batch_size 1 on 3 ranks takes 3 sequences at a time" in err


# --- job scripts -----------------------------------------------------------------------------------------------------


def test_a_job_script_takes_every_option_along(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(
        capsys,
        *("launch", "quickstart", "--write-sbatch", "job", "--num-nodes", "2", "--num-gpus", "1"),
        *("--run-dir", "my run", "--set", "seed=1", "--stop-after", "2h", "--max-restarts", "3"),
        *("--min-hosts", "1", "--no-doctor", "--master-port", "29777", "--sbatch=--partition=big"),
    )
    assert (status, err) == (0, "")
    assert out == (f"job: 2 x 1 ranks; sbatch job submits it, its log goes to {tmp_path}/my run/logs\n")
    lines = Path("job").read_text().splitlines()
    assert {"#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1", "#SBATCH --partition=big"} <= set(lines)
    words = shlex.split(lines[-1])
    assert words[words.index("launch") + 1 :] == [
        *("--spec", "quickstart", "--run-dir", "my run", "--stop-after", "2h", "--set", "seed=1"),
        *("--max-restarts", "3", "--min-hosts", "1", "--master-port", "29777", "--no-doctor", "--launcher", "slurm"),
    ]
    assert (tmp_path / "my run" / "logs").is_dir()
    assert subprocess.run(["bash", "-n", "job"]).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--write-sbatch: given without --num-gpus; add it: the job asks for so many GPUs on each node"),
        (["--num-gpus", "3"], "batch.global_batch_size: given 16; micro_batch_size 8 on 3 ranks"),
        (["--num-gpus", "1", "--hostfile", "h"], "--write-sbatch: given with --hostfile; Slurm chooses the hosts"),
        (["--num-gpus", "1", "--include", "h"], "--write-sbatch: given with --include h; Slurm chooses the hosts"),
        (["--num-gpus", "1", "--exclude", "h"], "--write-sbatch: given with --exclude h; Slurm chooses the hosts"),
        (
            ["--num-gpus", "1", "--launcher", "pdsh"],
            "--write-sbatch: given with --launcher pdsh; srun starts the ranks",
        ),
        (
            ["--num-gpus", "1", "--resume", "never"],
            "--write-sbatch: given with --resume never, which every job but the first would refuse; leave it out: a "
            "job goes on from the run's own newest checkpoint, and starts afresh in a new --run-dir",
        ),
        (
            ["--num-gpus", "1", "--resume", "/"],
            "--write-sbatch: given with --resume /, to which every job would go back; leave it out: a job goes on from "
            "the run's own newest checkpoint; make its first by dsllm launch --resume / --stop-after 10m inside an sal",
        ),
        (
            ["--num-gpus", "1", "--resume", "never"],
            "--write-sbatch: given with --resume never, which every job but the",
        ),
        (
            ["--num-gpus", "1", "--resume", "/"],
            "--write-sbatch: given with --resume /, to which every job would go back",
        ),
        (["--num-gpus", "1", "--sbatch", "qos"], "--write-sbatch: given 'qos'; must be an option of sbatch, such as"),
    ],
)
def test_a_job_that_cannot_be_written_is_refused_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "launch", "quickstart", "--write-sbatch", "job", *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"dsllm: {message}")
    assert list(tmp_path.iterdir()) == []


def test_a_job_script_that_cannot_be_written_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = str(tmp_path / "nowhere" / "job")
    status, _, err = run(
        capsys,
        *("launch", "quickstart", "--write-sbatch", file, "--num-gpus", "2", "--run-dir", str(tmp_path / "run")),
    )
    assert (status, err) == (1, f"dsllm: {file}: No such file or directory\n")
