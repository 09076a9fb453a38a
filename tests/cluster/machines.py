"""Two machines on one: each has its own network, host name, processes and /etc/hosts; the files are shared."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ranks import ROOT

PROGRAMS = Path(sys.executable).parent
NEEDS = ("ip", "unshare", "nsenter", "mount")
IPV4 = ("10.77.0.1", "10.77.0.2")
IPV6 = ("fd77::1", "fd77::2")


def why_not() -> str | None:
    """Return why this machine cannot hold two; None if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs Linux and root, for network namespaces"
    missing = [name for name in NEEDS if shutil.which(name) is None]
    if missing:
        return f"needs {', '.join(missing)} (Debian: iproute2, util-linux)"
    if subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode:
        return "this system does not allow namespaces"
    return None


class Machine:
    """One of the machines, with the host name ``node1`` or ``node2``."""

    def __init__(self, number: int, hosts: str, folder: Path) -> None:
        """``hosts``: the content of its /etc/hosts."""
        self.name = f"node{number}"
        names = folder / f"{self.name}.hosts"
        names.write_text(hosts)
        # the first process; all others of the machine end with it
        prepare = f"mount --make-rprivate / && mount --bind {names} /etc/hosts && hostname {self.name}"
        words = ["unshare", "--net", "--mount", "--uts", "--pid", "--ipc", "--fork", "--mount-proc", "--kill-child"]
        words += ["sh", "-c", f"{prepare} && ip link set lo up && echo ready && exec sleep 900"]
        self._outer = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self._outer.stdout is not None and self._outer.stdout.readline() == "ready\n"
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children").read_text().split()
        self.process = int(children[0])

    def words(self, words: Sequence[object]) -> list[str]:
        """Return the command that runs ``words`` on this machine."""
        return ["nsenter", "-t", str(self.process), "--all", f"--wd={ROOT}", *map(str, words)]

    def run(self, line: str) -> None:
        """Run a line of shell on this machine."""
        subprocess.run(self.words(["sh", "-ec", line]), check=True, capture_output=True, text=True)

    def start(self, words: Sequence[object], **variables: str) -> subprocess.Popen[str]:
        environment = {
            "PATH": f"{PROGRAMS}:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(Path.home()), "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **variables,
        }  # fmt: skip
        return subprocess.Popen(
            self.words(words), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def start_rank(self, rank: int, master: str, words: Sequence[object], **variables: str) -> subprocess.Popen[str]:
        """Start the only rank of this machine, as one of two."""
        numbers = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        return self.start(
            [PROGRAMS / "python", *words], MASTER_ADDR=master, MASTER_PORT="29511", **numbers, **variables
        )

    def serve_ssh(self, folder: Path) -> None:
        """Let the programs of ``ssh_folder`` connect to this machine; programs then have the environment of a login."""
        words = f"$(command -v sshd) -f /dev/null -h {folder}/key -o AuthorizedKeysFile={folder}/key.pub"
        self.run(
            f"mount -t tmpfs none /run && mkdir /run/sshd && {words} -o StrictModes=no -o UsePAM=no -o PidFile=none"
        )

    def close(self) -> None:
        os.kill(self.process, signal.SIGKILL)
        self._outer.wait()


def ssh_folder(folder: Path) -> Path:
    """Return a folder with a key, and a program ``ssh`` that uses it and no settings of the user."""
    folder.mkdir()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
    options = f"-F none -i {folder}/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    (folder / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} {options} "$@"\n')
    (folder / "ssh").chmod(0o755)
    return folder


@contextmanager
def two_machines(folder: Path, addresses: tuple[str, str] = IPV4) -> Iterator[tuple[Machine, Machine]]:
    """Two machines joined by a cable; each knows its own name as Debian does, as 127.0.1.1, if IPv4 is used."""
    found: list[Machine] = []
    folder.mkdir(exist_ok=True)
    try:
        for number in (1, 2):
            own = addresses[number - 1] if addresses == IPV6 else "127.0.1.1"
            lines = ["127.0.0.1 localhost", f"{own} node{number}", f"{addresses[2 - number]} node{3 - number}"]
            found.append(Machine(number, "\n".join(lines) + "\n", folder))
        first, second = found
        inside = ["nsenter", "-t", str(first.process), "-n"]
        cable = ["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", str(second.process)]
        subprocess.run([*inside, *cable], check=True)
        for machine, address in zip(found, addresses, strict=True):
            length = "64 nodad" if ":" in address else "24"
            machine.run(f"ip addr add {address}/{length} dev eth0 && ip link set eth0 up")
        yield first, second
    finally:
        for machine in found:
            machine.close()
