"""Slurm on two machines of ``machines``: a controller on the first, and a daemon that starts jobs on each."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cluster.machines import IPV4, PROGRAMS, Machine, two_machines
from ranks import ROOT

NEEDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
CPUS = 2
SETTINGS = """\
ClusterName=test
SlurmctldHost=node1
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={local}/munge.socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
StateSaveLocation={local}/controller
SlurmdSpoolDir={local}/daemon
SlurmctldPidFile={local}/slurmctld.pid
SlurmdPidFile={local}/slurmd.pid
SlurmctldLogFile={local}/slurmctld.log
SlurmdLogFile={local}/slurmd.log
ReturnToService=2
JobRequeue=1
KillWait=20
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,requeue_delay=1
NodeName=node1 NodeAddr={first} CPUs={cpus} State=UNKNOWN
NodeName=node2 NodeAddr={second} CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""


def why_no_slurm() -> str | None:
    missing = [name for name in NEEDS if shutil.which(name) is None and not Path(f"/usr/sbin/{name}").exists()]
    return f"needs {', '.join(missing)} (Debian: munge slurmd slurmctld slurm-client)" if missing else None


class Slurm:
    """Two machines with Slurm. ``environment``: of its commands."""

    def __init__(self, pair: tuple[Machine, Machine], folder: Path) -> None:
        self.machines, self.folder = pair, folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *words: object) -> str:
        """Run a command of Slurm on the first machine and return its output."""
        process = self.machines[0].start(words, **self.environment)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        return output

    def submit(self, words: Sequence[object], *options: str, **variables: str) -> str:
        """Submit the script of ``examples`` with a rank on each machine, and return the number of the job."""
        small = ["--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--time=30"]
        script = ROOT / "examples" / "slurm.sbatch"
        process = self.machines[0].start(
            ["sbatch", "--parsable", f"--output={self.folder}/%j.out", *small, *options, script, *words],
            **self.environment, **variables,
        )  # fmt: skip
        number, _ = process.communicate(timeout=60)
        assert process.returncode == 0, number
        return number.strip()

    def facts(self, job: str) -> dict[str, str]:
        """Return the fields of a job, such as ``JobState``."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job: str, *states: str, seconds: float = 120) -> dict[str, str]:
        """Wait until a job is in one of the states; a queued one begins at once, and not after two minutes."""
        deadline = time.monotonic() + seconds
        queued: float | None = None
        while True:
            facts = self.facts(job)
            if facts["JobState"] in states:
                return facts
            is_queued_again = facts["JobState"] == "PENDING" and facts["Reason"] == "BeginTime"
            queued = (queued or time.monotonic()) if is_queued_again else None
            # the daemons need time to remove the last start; Slurm itself waits two minutes
            if queued is not None and time.monotonic() > queued + 5:
                self.run("scontrol", "update", f"jobid={job}", "starttime=now")
            assert time.monotonic() < deadline, (facts, self.output(job))
            time.sleep(0.5)

    def output(self, job: str) -> str:
        """Return the output of a job."""
        path = self.folder / f"{job}.out"
        return path.read_text() if path.exists() else ""


@contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """Slurm on two machines."""
    folder.mkdir()
    local = folder / "local"
    local.mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    (folder / "slurm.conf").write_text(SETTINGS.format(local=local, first=IPV4[0], second=IPV4[1], cpus=CPUS))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    with two_machines(folder / "machines") as pair:
        found = Slurm(pair, folder)
        for machine in pair:
            own = folder / machine.name
            (own / "controller").mkdir(parents=True)
            (own / "daemon").mkdir()
            names = ("socket", "pid", "log", "seed")
            files = [f"--{name}{'' if name in ('socket',) else '-file'}={local}/munge.{name}" for name in names]
            machine.run(
                f"mount --bind {own} {local} && mount -t tmpfs none /run && "
                f"munged --force --key-file={folder}/munge.key {' '.join(files)}"
            )
            environment = f"export SLURM_CONF={folder}/slurm.conf PATH={PROGRAMS}:$PATH; "
            if machine is pair[0]:
                machine.run(environment + "slurmctld")
            machine.run(environment + f"slurmd -N {machine.name}")
        deadline = time.monotonic() + 30
        while found.run("sinfo", "--noheader", "--format=%T").split() != ["idle"]:
            assert time.monotonic() < deadline, found.run("sinfo")
            time.sleep(0.2)
        yield found


if __name__ == "__main__":
    import sys
    import tempfile

    with slurm(Path(tempfile.mkdtemp()) / "slurm") as lab:
        print(lab.folder)
        sys.stdin.read()
