"""What an agent learns for the doctor: to look at its host. Sent as source; the standard library, from Python 3.8 on.

No package is imported that is looked at: torch alone takes seconds, and may fail for the reason that is looked for.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import platform
import pwd
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

SMI_SECONDS = 20.0
"""A driver that hangs must not hang the answer; one without persistence mode wakes its GPUs for each question, which
takes eight of them more than 5 s."""
GPU_FIELDS = "index,uuid,name,memory.total,memory.free,driver_version"
PROCESS_FIELDS = "gpu_uuid,pid,used_memory,process_name"
NCCL_PACKAGES = ("nvidia-nccl-cu13", "nvidia-nccl-cu12", "nvidia-nccl-cu11")
SOURCES = (".py", ".yaml", ".cpp")
PROBE_BYTES = 65536
"""Written to see whether the folder takes it: a disk that is nearly full may still have room for a name."""


def clock() -> float:
    """Seconds since 1970."""
    return time.time()


def facts(packages: list[str], package_folder: str, spec: str | None) -> dict[str, Any]:
    """What is installed on this host and what it has, as `Facts` takes it.

    `package_folder` is where the launcher has dsllm, `spec` a file.
    """
    dsllm = dsllm_folder(package_folder)
    memory = memory_info()
    return {
        "host_name": socket.gethostname(),
        "user": user_of(os.getuid()),
        "python": platform.python_version(),
        "executable": sys.executable,
        "versions": {**{name: version_of(name) for name in packages}, "CUDA": cuda_version(), "NCCL": nccl_version()},
        "dsllm_version": dsllm and dsllm_version(dsllm),
        "dsllm_hash": dsllm and sources_hash(dsllm),
        "spec_hash": spec and file_hash(spec),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory.get("MemTotal", 0),
        "available_bytes": memory.get("MemAvailable", 0),
        "shared_memory_bytes": disk("/dev/shm")[0],
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        **gpu_facts(),
    }


def user_of(uid: int) -> str:
    """Name and number, which is what a shared file system goes by."""
    try:
        return pwd.getpwuid(uid).pw_name + " (" + str(uid) + ")"
    except KeyError:
        return str(uid)


def memory_info() -> dict[str, int]:
    """Of /proc/meminfo, in bytes."""
    with open("/proc/meminfo") as file:
        lines = [line.split() for line in file]
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if len(line) == 3}


# Software


def version_of(package: str) -> str | None:
    """As it is installed; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def nccl_version() -> str | None:
    """Of the package that torch brings."""
    return next((version for version in map(version_of, NCCL_PACKAGES) if version is not None), None)


def cuda_version() -> str | None:
    """What torch was built for, read where torch keeps it: `cuda: Optional[str] = '12.4'`."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return None
    found = re.search(
        r"^cuda\b[^=]*= *'([^']+)'", text(os.path.join(os.path.dirname(torch.origin), "version.py")), re.M
    )
    return found and found[1]


def dsllm_folder(package_folder: str) -> str | None:
    """Where a rank finds dsllm: like `train.py`, among what is installed, and then where `train.py` itself is."""
    paths = [path for path in sys.path if path] + [os.path.dirname(package_folder)]
    found = importlib.machinery.PathFinder.find_spec("dsllm", paths)
    return os.path.dirname(found.origin) if found is not None and found.origin is not None else None


def dsllm_version(folder: str) -> str | None:
    """As the package states it."""
    found = re.search(r'^__version__ = "(.+)"$', text(os.path.join(folder, "__init__.py")), re.M)
    return found and found[1]


def sources_hash(folder: str) -> str:
    """SHA-256 over names and content of all that is not made from them."""
    digest = hashlib.sha256()
    for path in sorted(source_files(folder)):
        digest.update(os.path.relpath(path, folder).encode() + b"\0" + str(file_hash(path)).encode() + b"\n")
    return digest.hexdigest()


def source_files(folder: str) -> Iterator[str]:
    """Whatever Python, torch or the planner reads."""
    for root, _, names in os.walk(folder):
        yield from (os.path.join(root, name) for name in names if name.endswith(SOURCES))


def file_hash(path: str) -> str | None:
    """SHA-256 of a file in hexadecimal; None where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for piece in iter(lambda: file.read(1 << 20), b""):
                digest.update(piece)
    except OSError:
        return None
    return digest.hexdigest()


def text(path: str) -> str:
    """Of a file; none where it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        return ""


# GPUs


def gpu_facts() -> dict[str, Any]:
    """Of NVIDIA's driver, as its own program has it: the GPUs that a session on this host may use, in their order."""
    if shutil.which("nvidia-smi") is None:
        return {"driver": None, "driver_error": None, "gpus": []}
    try:
        gpus = [line for line in ask_smi("gpu", GPU_FIELDS) if all(field.isdecimal() for field in line[3:5])]
        processes = ask_smi("compute-apps", PROCESS_FIELDS)
    except (OSError, subprocess.SubprocessError) as error:
        words = getattr(error, "stdout", None) or str(error)
        return {"driver": None, "driver_error": str(words).strip().splitlines()[-1], "gpus": []}
    return {
        "driver": gpus[0][5] if gpus else None,
        "driver_error": None,
        "gpus": [
            {
                "index": int(index),
                "name": name,
                "memory_bytes": int(total) << 20,
                "free_bytes": int(free) << 20,
                "processes": [process(*line[1:]) for line in processes if line[0] == uuid],
            }
            for index, uuid, name, total, free, _ in visible(gpus)
        ],
    }


def visible(gpus: list[list[str]]) -> list[list[str]]:
    """Of GPUs that begin with index and UUID, those that CUDA_VISIBLE_DEVICES lists, as it does: on a node that jobs
    share, the others are somebody else's. It takes an index, or a UUID that may be cut short."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None or "MIG-" in listed:  # of a part of a GPU nvidia-smi does not tell what is asked here
        return gpus
    names = [name.strip() for name in listed.split(",") if name.strip()]
    return [
        gpu for name in names for gpu in gpus if name == gpu[0] or (not name.isdecimal() and gpu[1].startswith(name))
    ]


def ask_smi(what: str, fields: str) -> list[list[str]]:
    """Lines of its answer, split into as many fields as were asked for."""
    done = subprocess.run(
        ["nvidia-smi", "--query-" + what + "=" + fields, "--format=csv,noheader,nounits"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SMI_SECONDS,
        check=True,
    )
    most = fields.count(",")
    lines = [[field.strip() for field in line.split(",", most)] for line in done.stdout.splitlines()]
    return [line for line in lines if len(line) == most + 1]


def process(pid: str, used: str, name: str) -> dict[str, Any]:
    """A process on a GPU; whose it is, where this host's /proc knows."""
    owner = None
    with contextlib.suppress(OSError):
        owner = user_of(os.stat("/proc/" + pid).st_uid)
    used_bytes = int(used) << 20 if used.isdecimal() else 0
    return {"pid": int(pid), "name": os.path.basename(name), "user": owner, "used_bytes": used_bytes}


# Folders


def leave_token(folder: str, token: str) -> dict[str, Any]:
    """Write a file of that name into the folder, which is made where it is missing: what it is on, as `FolderFacts`
    takes it, and which folders were `made`, from the innermost."""
    folder = os.path.abspath(os.path.expanduser(folder))
    made = missing_folders(folder)
    there = os.path.dirname(made[-1]) if made else folder
    free_bytes = disk(there)[1]  # without what is written now
    error = None
    try:
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, token), "wb") as file:
            file.write(b"\0" * PROBE_BYTES)
            file.flush()
            os.fsync(file.fileno())
    except OSError as failure:
        error = str(failure.strerror)
    pattern = os.path.join(glob.escape(folder), "checkpoints", "global_step*[0-9]", "manifest.json")
    return {
        "error": error,
        "free_bytes": free_bytes,
        "file_system": file_system(there),
        "checkpoints": len(glob.glob(pattern)),
        "made": made,
    }


def see_tokens(folder: str, tokens: list[str]) -> list[str]:
    """Those of these files that this host sees. By name: NFS may show a list of the folder as it was a minute ago."""
    folder = os.path.expanduser(folder)
    return [token for token in tokens if os.path.exists(os.path.join(folder, token))]


def remove_token(folder: str, token: str) -> None:
    """Take the file away again."""
    with contextlib.suppress(OSError):
        os.remove(os.path.join(os.path.expanduser(folder), token))


def remove_made(made: list[str]) -> None:
    """Take away the folders that were made for the file, where nothing else has come into them."""
    for path in made:
        with contextlib.suppress(OSError):
            os.rmdir(path)


def missing_folders(folder: str) -> list[str]:
    """The folder and those above it that are not there, innermost first."""
    missing = []
    while not os.path.isdir(folder) and folder != os.path.dirname(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    return missing


def disk(folder: str) -> tuple[int, int]:
    """Bytes in all and free for this user; zeros where there is no such folder."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return 0, 0
    return found.f_frsize * found.f_blocks, found.f_frsize * found.f_bavail


def file_system(folder: str) -> str:
    """The kind that it is mounted as, such as `nfs4`."""
    folder = os.path.realpath(folder)
    kinds = {"/": "?"}
    for line in text("/proc/self/mounts").splitlines():
        fields = line.split()
        kinds[fields[1].replace("\\040", " ")] = fields[2]
    while folder not in kinds:
        folder = os.path.dirname(folder)
    return kinds[folder]


def manifest(folder: str) -> str | None:
    """What `dsllm.data.shards.manifest_hash` gives for a folder of tokens; None where there is no manifest."""
    return file_hash(os.path.join(os.path.expanduser(folder), "manifest.json"))


ANSWERS: dict[str, Callable[..., Any]] = {
    "clock": clock,
    "facts": facts,
    "leave_token": leave_token,
    "see_tokens": see_tokens,
    "remove_token": remove_token,
    "remove_made": remove_made,
    "manifest": manifest,
}
