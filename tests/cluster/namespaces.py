"""Hosts on one machine: each with its own address, host name, sshd, processes, /tmp, /run and /dev/shm.

They share the rest of the file system, as hosts that mount one NFS do, and a home folder that is the cluster's own:
no file of the user's, such as ~/.ssh or ~/.deepspeed_env, is read or written. Every fault is a context manager that
puts things back (tests/cluster/host.py), so that many tests can share a cluster.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import string
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.host import Host
from tests.cluster.isolation import Process, connect, isolated, send, wait_until

ROOT = Path(__file__).resolve().parents[2]
NETWORK = "10.77.0"
"""The first three numbers of the hosts' addresses. No network outside ever sees them, so clusters may share them."""

SSH_CONFIG = """\
Host *
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""

OWN_FOLDERS = """\
mount -t sysfs sysfs /sys
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd /run/lock /run/before
for folder in /tmp /dev/shm; do
    mount --bind $folder /run/before
    mount -t tmpfs -o mode=1777 tmpfs $folder
    for shared in {shared}; do
        case $shared in $folder/*)
            mkdir -p "$shared"
            mount --bind "/run/before${{shared#$folder}}" "$shared"
        esac
    done
    umount /run/before
done
"""


@dataclass(frozen=True)
class Cluster:
    """Hosts that reach each other by name and by address, through one switch."""

    hosts: tuple[Host, ...]
    home: Path
    """Root's home folder on all of them, with .ssh; put a .deepspeed_env here."""

    def write_hostfile(self, path: Path, slots: int = 1) -> Path:
        """A hostfile with all hosts by name."""
        path.write_text("".join(f"{host.name} slots={slots}\n" for host in self.hosts))
        return path

    def processes(self) -> dict[str, list[Process]]:
        """Of each host that has any, what `Host.processes` says: empty where nothing was left behind."""
        return {host.name: found for host in self.hosts if (found := host.processes())}

    def end_processes(self) -> None:
        """Kills what tests left on the hosts."""
        for host in self.hosts:
            for each in host.processes():
                send(each.outer_pid, signal.SIGKILL)
        wait_until(lambda: not self.processes(), "what was killed ends")


@contextlib.contextmanager
def cluster(num_hosts: int, folder: Path, shared: Sequence[Path] = ()) -> Iterator[Cluster]:
    """`num_hosts` hosts, host-a, host-b and so on, that are gone afterwards; what `folder` holds stays.

    `shared` are folders that all hosts see even where they are below /tmp, which each host has for itself; `folder`,
    the repository and the Python that runs this are among them anyway.
    """
    names = [f"host-{letter}" for letter in string.ascii_lowercase[:num_hosts]]
    addresses = [f"{NETWORK}.{number}" for number in range(1, num_hosts + 1)]
    seen = {path.resolve() for path in (folder, ROOT, Path(sys.prefix), Path(sys.base_prefix), *shared)}
    home = _make_home(folder / "home")
    files = _system_files(folder, home, dict(zip(names, addresses, strict=True)))
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(isolated())
        hub.do("ip link add switch type bridge && ip link set switch up")
        hosts = []
        for name, address in zip(names, addresses, strict=True):
            host = Host(name, address, folder / name, home, stack.enter_context(isolated()), hub)
            stack.callback(host.stop_sshd)
            _set_up(host, seen, files)
            hosts.append(host)
        yield Cluster(tuple(hosts), home)


def _make_home(home: Path) -> Path:
    """A home folder with keys to every host; compiled operators are kept where they always are, as they take long."""
    (home / ".ssh").mkdir(parents=True)
    key = home / ".ssh" / "id_ed25519"
    _make_key(key)
    key.with_suffix(".pub").rename(home / ".ssh" / "authorized_keys")
    (home / ".ssh" / "config").write_text(SSH_CONFIG)
    cache = Path(os.path.expanduser("~/.cache"))
    cache.mkdir(exist_ok=True)
    (home / ".cache").symlink_to(cache)
    return home


def _system_files(folder: Path, home: Path, addresses: Mapping[str, str]) -> dict[str, Path]:
    """What all hosts find in /etc: their names, and root with another home and no password that could be locked."""
    names = "".join(f"{address} {name}\n" for name, address in addresses.items())
    users = [line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith("root:")]
    contents = {
        "hosts": f"127.0.0.1 localhost\n::1 localhost\n{names}",
        "passwd": "\n".join([f"root:x:0:0:root:{home}:/bin/bash", *users, ""]),
        "shadow": "root:*:19000:0:99999:7:::\n",
        "resolv.conf": "",
    }
    for name, content in contents.items():
        (folder / name).write_text(content)
    return {f"/etc/{name}": folder / name for name in contents}


def _set_up(host: Host, shared: set[Path], files: Mapping[str, Path]) -> None:
    """Plugs in the cable, mounts what is the host's own, and starts sshd."""
    host.folder.mkdir()
    _make_key(host.folder / "host_key")
    (host.folder / "hostname").write_text(f"{host.name}\n")
    connect(host.hub, host.name, host.isolation, "eth0")
    host.hub.do(f"ip link set {host.name} master switch")
    binds = {**files, "/etc/hostname": host.folder / "hostname"}
    host.isolation.do(
        f"echo {host.name} > /proc/sys/kernel/hostname\n"
        f"ip link set lo up\nip address add {host.address}/24 dev eth0\nip link set eth0 up\n"
        + OWN_FOLDERS.format(shared=" ".join(shlex.quote(str(path)) for path in sorted(shared)))
        + "".join(f"[ ! -e {path} ] || mount --bind {shlex.quote(str(file))} {path}\n" for path, file in binds.items())
    )
    host.plug_in()
    host.start_sshd()


def _make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "tests", "-f", path], check=True)
