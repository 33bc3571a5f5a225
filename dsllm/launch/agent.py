"""What stands on every host of a launch, from before its ranks until after them, and answers the launcher.

It is sent as source through the way to the host (see `hosts.py`) and runs whatever is installed there: one file, the
standard library, Linux's /proc. A request is a line of JSON, `{"id": 1, "do": "signal", ...}`; so is its answer.

Where the launcher hangs up, or is silent for SILENT_SECONDS, nobody is left to end the ranks of this host: the agent
does, and ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

SILENT_SECONDS = 90.0
"""The launcher writes every five seconds: this is a way that is gone, or a launcher that is. It gives a host up sooner
itself (`hosts.LOST_SECONDS`)."""
LOOK_SECONDS = 5.0
"""Silence is counted in looks, not by the clock: a job that was suspended as a whole goes on as if nothing had been."""
KILL_SECONDS = 6.0
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface
FIRST_FAILED = 8

guarded: set[str] = set()
"""Launches whose ranks this agent ends when it ends itself."""
listeners: dict[int, socket.socket] = {}
writing = threading.Lock()


def serve() -> None:
    """Answer until the launcher hangs up or falls silent."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # of this host's terminal or service manager: the launcher decides
    try:
        with contextlib.suppress(OSError):  # a way that is reset
            os.write(1, b"\n")  # a login script may have left a line without its end
            read_requests()
    finally:
        leave()
        os._exit(0)  # whatever hangs


def read_requests() -> None:
    """Answer each line, until there are no more."""
    rest, silent_seconds = b"", 0.0
    while silent_seconds < SILENT_SECONDS:
        if not select.select([0], [], [], LOOK_SECONDS)[0]:
            silent_seconds += LOOK_SECONDS
            continue
        piece, silent_seconds = os.read(0, 1 << 16), 0.0
        if not piece:
            return
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            # each in a thread: one that hangs in a file system keeps no other from its answer
            threading.Thread(target=reply, args=(json.loads(line),), daemon=True).start()


def reply(request: dict[str, Any]) -> None:
    """A thread's work: one request."""
    answered = answer(request)
    with writing, contextlib.suppress(OSError):  # the main thread learns that the launcher is gone
        write(answered)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What a request comes to: its result, or the error's own words."""
    number, do = request.pop("id"), request.pop("do")
    try:
        return {"id": number, "result": ANSWERS[do](**request)}
    except Exception as error:
        return {"id": number, "error": f"{type(error).__name__}: {error}"}


def write(message: dict[str, Any]) -> None:
    """One line, whole."""
    line = json.dumps(message).encode() + b"\n"
    while line:
        line = line[os.write(1, line) :]


def leave() -> None:
    """Nothing of a guarded launch stays behind."""
    for launch in list(guarded):
        sweep(launch)


def ping() -> bool:
    """Says that this host and the way to it are there."""
    return True


def learn(source: str) -> None:
    """Take more answers: the functions that `source` lists in its own ANSWERS."""
    names: dict[str, Any] = {"__name__": "learned"}
    exec(compile(source, "learned", "exec"), names)
    ANSWERS.update(names["ANSWERS"])


# The processes of a launch


def guard(launch: str) -> None:
    """From now on the ranks of this launch on this host end with the agent."""
    guarded.add(launch)


def send_signal(launch: str, number: int) -> int:
    """To every rank of the launch on this host; how many those are."""
    pids = ranks_of(launch)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return len(pids)


def sweep(launch: str) -> list[str]:
    """End what is left of the launch on this host, and its private files. Returns the command lines of what was."""
    killed: dict[int, str] = {}
    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline:
        left = processes_of(launch)
        if not left:
            break
        for pid, command in left.items():
            killed[pid] = command
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    guarded.discard(launch)
    shutil.rmtree(private_folder(launch), ignore_errors=True)
    return list(killed.values())


def processes_of(launch: str) -> dict[int, str]:
    """Command lines by process id: those with the launch in their environment or on their command line."""
    found = {}
    for folder in glob.glob("/proc/[0-9]*"):
        pid = int(os.path.basename(folder))
        environment, command = read(folder, "environ"), read(folder, "cmdline")
        is_its = b"DSLLM_LAUNCH=" + launch.encode() in environment.split(b"\0") or launch.encode() in command
        if is_its and pid != os.getpid() and not is_zombie(folder):
            found[pid] = command.replace(b"\0", b" ").decode(errors="replace").strip()
    return found


def ranks_of(launch: str) -> list[int]:
    """Process ids of the ranks, without what those have started themselves."""
    pids = [pid for pid in processes_of(launch) if rank_of(pid) is not None]
    return [pid for pid in pids if parent_of(pid) not in pids]


def rank_of(pid: int) -> bytes | None:
    """The rank that a process was started as, if it was."""
    entries = read(f"/proc/{pid}", "environ").split(b"\0")
    variables = dict(entry.split(b"=", 1) for entry in entries if b"=" in entry)
    return next((variables[name.encode()] for name in RANK_VARIABLES if name.encode() in variables), None)


def parent_of(pid: int) -> int:
    """The process that started this one; 0 where it has ended."""
    fields = read(f"/proc/{pid}", "stat").rpartition(b")")[2].split()
    return int(fields[1]) if len(fields) > 1 else 0


def is_zombie(folder: str) -> bool:
    """Whether a process has ended, and only its parent's look at it is missing."""
    return read(folder, "stat").rpartition(b")")[2].split()[:1] in ([b"Z"], [])


def read(folder: str, name: str) -> bytes:
    """A file of /proc; nothing where the process has ended, or is another user's."""
    try:
        with open(os.path.join(folder, name), "rb") as file:
            return file.read()
    except OSError:
        return b""


# Private files


def private_folder(launch: str) -> str:
    """On every host the same path, on none a shared one."""
    return "/tmp/dsllm-" + launch


def write_private(launch: str, text: str) -> str:
    """The environment of the launch, for this user's eyes only. Returns its path; raises where somebody was faster."""
    folder = private_folder(launch)
    os.mkdir(folder, stat.S_IRWXU)
    path = os.path.join(folder, "environment")
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, stat.S_IRUSR | stat.S_IWUSR), "w") as file:
        file.write(text)
    return path


# Ports and addresses


def free_port(preferred: int) -> int:
    """`preferred` where nothing listens on it, else a port that the system gives."""
    for port in (preferred, 0):
        with contextlib.suppress(OSError), listener_at(port) as probe:
            return probe.getsockname()[1]
    raise OSError("no free port")


def listener_at(port: int) -> socket.socket:
    """At every address of this host, by IPv6 and IPv4 where it has both."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=both)


def listen(port: int, word: str) -> None:
    """Greet whoever connects to the port with `word`, until `unlisten`."""
    listener = listeners[port] = listener_at(port)
    threading.Thread(target=greet, args=(listener, word.encode()), daemon=True).start()


def unlisten(port: int) -> None:
    """Leave the port."""
    listener = listeners.pop(port)
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)  # wakes accept
    listener.close()


def greet(listener: socket.socket, word: bytes) -> None:
    """A thread's work: until the listener is closed."""
    with contextlib.suppress(OSError):
        while True:
            caller, _ = listener.accept()
            with caller, contextlib.suppress(OSError):
                caller.sendall(word)


def connect(address: str, port: int, word: str, patience: float) -> dict[str, Any]:
    """Whether the port answers with `word`, and which interface of this host leads there.

    `{"error": words}`, or `{"error": None, "interface": name, "address": own address on the way, "peer": the other's}`.
    """
    try:
        with call(address, port, patience) as caller:
            said = b""
            while len(said) < len(word):
                piece = caller.recv(len(word) - len(said))
                if not piece:
                    break
                said += piece
            own, peer = caller.getsockname()[0], caller.getpeername()[0]
    except OSError as error:
        return {"error": error.strerror or str(error)}
    if said != word.encode():
        return {"error": "something else listens there"}
    return {"error": None, "interface": interface_of(own), "address": own, "peer": peer}


def call(address: str, port: int, patience: float) -> socket.socket:
    """Connect, by IPv4 where the name has such an address: gloo takes that of an interface first, too."""
    found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    failures = []
    for family, kind, protocol, _, place in sorted(found, key=lambda one: one[0] != socket.AF_INET):
        caller = socket.socket(family, kind, protocol)
        try:
            caller.settimeout(patience)
            caller.connect(place)
        except OSError as error:
            caller.close()
            failures.append(error)
        else:
            return caller
    raise failures[0]


def reach(targets: list[list[Any]], word: str, patience: float) -> list[dict[str, Any]]:
    """`connect` to every one of these `[address, port]` at once, in their order."""
    found: list[dict[str, Any]] = [{"error": "timed out"} for _ in targets]

    def reach_one(number: int) -> None:
        address, port = targets[number]
        found[number] = connect(address, port, word, patience)

    threads = [threading.Thread(target=reach_one, args=(number,), daemon=True) for number in range(len(targets))]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 2 * patience  # of a resolver that hangs
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return list(found)


def addresses() -> list[list[str]]:
    """`[interface, address]` of every address that others could reach: IPv4 first, then IPv6; loopback last."""
    found = [[name, own] for _, name in socket.if_nameindex() for own in [address_of(name)] if own is not None]
    return sorted(found + addresses_6(), key=lambda pair: pair[1].startswith("127."))


def interface_of(address: str) -> str | None:
    """The interface that has the address; None where none has."""
    return next((name for name, own in addresses() if own == address), None)


def address_of(interface: str) -> str | None:
    """Its IPv4 address, None where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answered = fcntl.ioctl(any_socket, SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(answered[20:24])  # struct ifreq: 16 bytes of name, 4 of family and port


def addresses_6() -> list[list[str]]:
    """`[interface, IPv6 address]` of every global one, by Linux's /proc/net/if_inet6."""
    lines = [line.split() for line in read("/proc/net", "if_inet6").decode().splitlines()]
    is_global = "00"
    return [
        [line[5], socket.inet_ntop(socket.AF_INET6, bytes.fromhex(line[0]))] for line in lines if line[3] == is_global
    ]


# Programs and last words


def run(command: list[str], environment: dict[str, str], folder: str, limit: float) -> dict[str, Any]:
    """A program to its end: exit status, None where it took longer, and what it wrote."""
    try:
        done = subprocess.run(
            command,
            env=dict(os.environ, **environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        return {"status": None, "stdout": text_of(late.stdout), "stderr": text_of(late.stderr)}
    return {"status": done.returncode, "stdout": text_of(done.stdout), "stderr": text_of(done.stderr)}


def text_of(output: bytes | None) -> str:
    """What a program wrote, readable whatever it was."""
    return (output or b"").decode(errors="replace")


def last_words(launch: str, logs: str) -> list[dict[str, Any]]:
    """What the ranks that failed by themselves wrote into the folder `logs`, the first ones first."""
    words = []
    for path in glob.glob(os.path.join(glob.escape(logs), "rank*.ended.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # whatever else lies there
            with open(path) as file:
                word = json.load(file)
            if word["launch"] == launch:
                words.append(((not word["is_own"], word["time"]), word))
    return [word for _, word in sorted(words, key=lambda pair: pair[0])[:FIRST_FAILED]]


def tail(path: str, lines: int) -> list[str]:
    """The last lines of a file; none where it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 400 * lines))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except OSError:
        return []


ANSWERS: dict[str, Callable[..., Any]] = {
    "ping": ping,
    "learn": learn,
    "guard": guard,
    "send_signal": send_signal,
    "sweep": sweep,
    "write_private": write_private,
    "free_port": free_port,
    "listen": listen,
    "unlisten": unlisten,
    "connect": connect,
    "reach": reach,
    "addresses": addresses,
    "run": run,
    "last_words": last_words,
    "tail": tail,
}

if __name__ == "__main__":
    serve()
