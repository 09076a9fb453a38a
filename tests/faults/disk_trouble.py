"""Save checkpoints to a disk that fails and recovers: ``disk_trouble.py RUN mount|limit``.

``mount`` puts the checkpoints on a small tmpfs, which needs a mount namespace (``unshare --mount``); ``limit`` sets a
maximum file size.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist
from faults.test_writer import make_payloads

from streamtrain.checkpoint.writer import CheckpointPayload, CheckpointWriter
from streamtrain.config.run import RunConfig
from streamtrain.run.directory import CHECKPOINTS

run, kind = Path(sys.argv[1]), sys.argv[2]
folder = run / "checkpoints"


def mount(*options: str) -> None:
    subprocess.run(["mount", *options, folder], check=True)


def limit(num_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def fill_disk() -> Path:
    ballast = folder / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(256))
        except OSError:
            return ballast


def save(step: int, megabytes: int = 0) -> None:
    """Save a checkpoint with ``megabytes`` of shared values, which do not count in the check of free space."""
    whole = make_payloads(step, 1)[CHECKPOINTS]
    shared = {"center": whole.shared["center"].new_zeros(megabytes * 250_000)}
    writer.save(step, {CHECKPOINTS: CheckpointPayload(whole.shards, shared, whole.shapes, whole.state)})
    writer.wait()
    lines = [*(f"warning: {line}" for line in writer.warnings()), f"step {step}: {writer.status_message()}"]
    print("\n".join(lines), flush=True)


folder.mkdir(parents=True)
if kind == "mount":
    mount("-t", "tmpfs", "-o", "size=256k", "tmpfs")
dist.init_process_group("gloo", init_method=f"file://{run}/rendezvous", rank=0, world_size=1)
writer = CheckpointWriter(run, RunConfig(keep_last=1))
save(1)
save(2)
if kind == "mount":
    save(3, megabytes=1)
    ballast = fill_disk()
    save(4)
    ballast.unlink()
    save(5)
    mount("-o", "remount,ro")
    save(6)
    mount("-o", "remount,rw")
else:
    limit(500_000)
    save(3, megabytes=1)
    limit(resource.RLIM_INFINITY)
save(7)
print(sorted(path.name for path in folder.iterdir()), flush=True)
dist.destroy_process_group()
