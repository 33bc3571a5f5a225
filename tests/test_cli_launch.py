"""`dsllm launch` and `dsllm check` up to the ranks: what they print, refuse, hand on and end with."""

from __future__ import annotations

import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from dsllm.cli.launch import conclude
from dsllm.errors import DsllmError, UserError
from dsllm.launch import launchers
from dsllm.launch.agent import is_zombie
from dsllm.launch.ending import Ending
from tests.test_cli import ROOT, run

TRAIN = str(ROOT / "dsllm" / "train.py")
TWO_NODES = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NODELIST": "gpu[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "2",
}
FOUR_RANKS = ("--set", "batch.micro_batch_size=4")


@pytest.fixture(autouse=True)
def _plain_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No GPUs, no job, nothing that would be told to other hosts; all launchers seem to be installed."""
    monkeypatch.setenv("DSLLM_DEBUG", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in os.environ:
        if name.startswith(("SLURM", "HF_", "WANDB_", "NCCL_", "TORCH_", "OMP_", "PYTHON", "GLOO_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(launchers.shutil, "which", lambda name: f"/bin/{name}")


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


# --- how a launch ends -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cause", ["finished", "stopped"])
def test_a_good_end_says_nothing_more(cause: str) -> None:
    conclude(Ending(cause, "all steps are done"))


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        (Ending("out_of_memory", "why", 0, "a"), 1),
        (Ending("user_error", "why", 0, "a"), 2),
        (Ending("user_error", "the ranks said why"), 2),
    ],
)
def test_what_rank_0_has_said_on_screen_is_not_said_again(ending: Ending, status: int) -> None:
    with pytest.raises(typer.Exit) as end:
        conclude(ending)
    assert end.value.exit_code == status


@pytest.mark.parametrize(
    ("ending", "kind", "message"),
    [
        (
            Ending("lost_rank", "rank 0 on a: gone", 0, "a"),
            DsllmError,
            "ended by lost_rank on a: rank 0 on a: gone; ADVICE",
        ),
        (
            Ending("hang", "rank 1 on b: no progress", 1, "b"),
            DsllmError,
            "ended by hang on b: rank 1 on b: no progress; ADVICE",
        ),
        (Ending("user_error", "no such file", 1, "b"), UserError, "ended by user_error on b: no such file"),
        (Ending("fault", "ended with status 7"), DsllmError, "ended by fault: ended with status 7; ADVICE"),
    ],
)
def test_what_nobody_has_said_on_screen_is_said(ending: Ending, kind: type[DsllmError], message: str) -> None:
    with pytest.raises(kind) as fault:
        conclude(ending, goes_on="ADVICE")
    assert str(fault.value) == message
    assert fault.value.exit_code == ending.exit_status


# --- a launcher of the test in DeepSpeed's place ---------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _signals_are_heard() -> Iterator[None]:
    """Whoever runs the tests in the background, or under nohup, has them ignored, and so would what a test starts."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def launcher(tmp_path: Path) -> Path:
    """A Python environment's folder whose `deepspeed` is a script of the test."""
    (tmp_path / "python").symlink_to(sys.executable)
    return tmp_path / "deepspeed"


def launch_with(launcher: Path, script: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    launcher.write_text(f"#!/bin/sh\n{script}\n")
    launcher.chmod(launcher.stat().st_mode | stat.S_IXUSR)
    given = list(arguments or ("launch", "quickstart", "--run-dir", str(launcher.parent / "run")))
    program = (
        f"import sys; sys.executable = {str(launcher.parent / 'python')!r}\n"
        "from dsllm.cli.app import main\n"
        f"sys.argv = ['dsllm', *{given!r}]\n"
        "main()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "HISTORY": str(launcher.parent / "run" / "history.jsonl"), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def lines_until_ready(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    lines: list[str] = []
    while "ready" not in lines:
        assert process.poll() is None
        lines.append(process.stdout.readline().strip())
    return lines


def rank_in_shell(script: str) -> str:
    """A launcher whose only rank is this script, and whose status is the rank's. `note EVENT` is for its history."""
    note = 'note() { echo "{\\"event\\": \\"$1\\", \\"step\\": 1, \\"by\\": \\"a signal\\"}" >> $HISTORY; }'
    script = f"{note}\n{script}"
    return f"RANK=0 sh -c {shlex.quote(script)}; exit $?"


SAVES = "trap 'echo saved; note stopped; exit 0' TERM INT; echo ready; while :; do sleep 0.05; done"


def test_a_launch_hands_sigusr1_and_sigusr2_on_to_the_ranks_and_no_launcher_dies_of_them(launcher: Path) -> None:
    rank = (
        "import signal, sys, time\n"
        "said = []\n"
        "for name in ('SIGUSR1', 'SIGUSR2'):\n"
        "    number = getattr(signal, name)\n"
        "    print(signal.getsignal(number) == signal.SIG_IGN, flush=True)\n"
        "    signal.signal(number, lambda number, frame: said.append(number))\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1, signal.SIGUSR2})\n"
        "print('ready', flush=True)\n"
        "while len(said) < 2: time.sleep(0.05)\n"
        "print(*map(int, said), flush=True)\n"
        "import os; open(os.environ['HISTORY'], 'a').write('{\"event\": \"finished\"}\\n')\n"
    )
    (launcher.parent / "rank.py").write_text(rank)
    process = launch_with(launcher, f"RANK=0 {launcher.parent}/python {launcher.parent}/rank.py; exit $?")
    assert lines_until_ready(process)[-3:-1] == ["True", "True"], "until a rank answers them, they are ignored"
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        process.send_signal(number)
        time.sleep(0.5)  # two pending signals have no order
    assert process.stdout is not None
    assert process.stdout.read().strip() == f"{signal.SIGUSR1:d} {signal.SIGUSR2:d}"
    assert process.wait(timeout=60) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_launch_hands_on_the_signal_and_waits_for_the_run_to_end(launcher: Path, number: signal.Signals) -> None:
    process = launch_with(launcher, rank_in_shell(SAVES))
    lines_until_ready(process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    assert process.stdout is not None
    assert "saved" in process.stdout.read()
    assert process.wait(timeout=60) == 0


def test_inside_a_shell_of_slurm_the_signal_goes_to_the_ranks_all_the_same(launcher: Path) -> None:
    """`srun --pty bash` has the variables of rank 0; DeepSpeed's launcher must not be taken for it."""
    process = launch_with(launcher, rank_in_shell(SAVES), SLURM_PROCID="0", SLURM_STEP_ID="0", RANK="0")
    lines_until_ready(process)
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert "saved" in process.stdout.read()
    assert process.wait(timeout=60) == 0


def test_a_second_ctrl_c_reaches_the_ranks_too(launcher: Path) -> None:
    """The ranks make of it what they like: to them it means to end at once."""
    script = "trap 'echo first; trap \"echo second; note stopped; exit 0\" INT' INT; echo ready; "
    process = launch_with(launcher, rank_in_shell(script + "while :; do sleep 0.05; done"))
    lines_until_ready(process)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    while process.stdout.readline().strip() != "first":
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert "second" in process.stdout.read()
    assert process.wait(timeout=60) == 0


def test_under_nohup_a_closed_terminal_ends_nothing(launcher: Path) -> None:
    script = "trap 'echo hung up; exit 0' HUP; echo ready; i=0; while [ $i -lt 20 ]; do sleep 0.05; i=$((i+1)); done"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = launch_with(launcher, rank_in_shell(script + "; note finished; echo finished"))
    finally:
        signal.signal(signal.SIGHUP, before)
    lines_until_ready(process)
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate(timeout=60)
    assert (out.strip(), process.returncode) == ("finished", 0)


def test_a_signal_before_there_is_a_rank_ends_the_launch_at_once(launcher: Path) -> None:
    process = launch_with(launcher, "echo ready; sleep 600")
    lines_until_ready(process)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, "nothing was saved"
    assert "dsllm: ended by interrupted: SIGTERM ended it before the ranks could save" in err
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(("status", "expected"), [(7, 1), (2, 2), (0, 1)])
def test_a_launch_ends_with_2_for_a_mistake_and_1_for_a_fault(launcher: Path, status: int, expected: int) -> None:
    process = launch_with(launcher, f"echo $DS_ACCELERATOR $DSLLM_WORLD_SIZE; exit {status}")
    out, err = process.communicate(timeout=60)
    assert out.splitlines()[-1] == "cpu 2"
    assert process.returncode == expected
    if status != 2:  # 0 is what DeepSpeed's launcher ends with where a signal has ended it
        words = f"dsllm: ended by fault: the launcher ended with status {status}, and no rank said why; "
        assert err.splitlines()[-1].startswith(words)


def test_a_launcher_that_is_not_installed_is_one_line(launcher: Path) -> None:
    bare = launcher.parent / "bin"
    bare.mkdir()
    (bare / "sh").symlink_to("/bin/sh")
    process = launch_with(launcher, "", PATH=str(bare))
    launcher.unlink()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    message = "dsllm: deepspeed: not installed; install it (deepspeed by pip install 'dsllm[train]')"
    assert err.splitlines()[-1].startswith(message)


def test_what_a_launcher_leaves_behind_is_ended(launcher: Path) -> None:
    process = launch_with(launcher, "setsid sleep 600 & echo $!; sleep 1; exit 5")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert is_zombie(f"/proc/{out.split()[-1]}"), "or nothing at all"


# --- check -----------------------------------------------------------------------------------------------------------

A_FAILED_CHECK = {"name": "first loss", "passed": False, "expected": "5.96", "found": "87.00", "seconds": 1.25}
ENDS_WITH_IT = f"""
while [ "$1" != --run-dir ]; do shift; done
echo '{json.dumps({"passed": False, "checks": [A_FAILED_CHECK]})}' > "$2/checks.json"
case "$*" in *--check*) echo "chatter of the ranks"; exit 1;; esac
"""


def test_a_check_that_fails_is_told_in_a_table_and_ends_with_1(launcher: Path) -> None:
    process = launch_with(launcher, ENDS_WITH_IT, "check", "quickstart")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    row = next(line for line in out.splitlines() if line.strip().startswith("first loss"))
    assert row.split() == ["first", "loss", "FAILED", "1.2s", "87.00", "5.96"]


def test_as_json_nothing_but_the_answers_is_printed(launcher: Path) -> None:
    process = launch_with(launcher, ENDS_WITH_IT, "check", "quickstart", "--json")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert json.loads(out) == {"passed": False, "checks": [A_FAILED_CHECK]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-gpus", "3"], "batch.global_batch_size: given 16; micro_batch_size 8 on 3 ranks takes 24 sequences"),
        (["--set", "zero.stage=7"], "quickstart: zero.stage: given 7"),
    ],
)
def test_a_run_that_cannot_be_checked_is_the_users_mistake(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    status, out, err = run(capsys, "check", "quickstart", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"dsllm: {message}")
