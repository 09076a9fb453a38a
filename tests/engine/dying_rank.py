"""A rank of torchrun: ``dying_rank.py RANK ATTEMPTS``. RANK is killed in the first ATTEMPTS, after the meeting."""

from __future__ import annotations

import os
import signal
import sys

import torch

from streamtrain.config.engine import EngineConfig
from streamtrain.engine.rendezvous import Launch
from streamtrain.engine.runtime import init_process_group

dies, attempts = int(sys.argv[1]), int(sys.argv[2])
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
launch = Launch.from_environment()
settings = EngineConfig(device="cpu", cpu_kernels=False, collective_timeout_seconds=60.0)
with init_process_group(settings, launch):
    ranks = torch.ones(1)
    torch.distributed.all_reduce(ranks)
    if launch.rank == dies and attempt < attempts:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.all_reduce(torch.ones(1))
    print(f"attempt {attempt} has {int(ranks)} ranks", flush=True)
