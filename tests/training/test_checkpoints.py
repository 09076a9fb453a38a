"""The checkpoint policy, and the reduction of losses and stop codes over ranks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from joined_processes import run_on_ranks

from streamtrain.config.run import RunConfig
from streamtrain.run.directory import CHECKPOINTS, SNAPSHOTS
from streamtrain.run.signals import EXIT_PREEMPTED, SAVE
from streamtrain.training.checkpoints import kinds_to_save
from streamtrain.training.step import read_results

CONFIG = RunConfig(steps=100, checkpoint_every=10, snapshot_every=4)


@pytest.mark.parametrize(
    ("step", "keys", "kinds"),
    [
        (10, {}, [CHECKPOINTS]),
        (11, {}, []),
        (12, {}, [SNAPSHOTS]),
        (20, {}, [CHECKPOINTS, SNAPSHOTS]),
        (11, {"is_best": True}, [CHECKPOINTS]),
        (11, {"stop_request": SAVE}, [CHECKPOINTS]),
        # a skipped step changes no weights
        (20, {"applied": False, "is_best": True}, []),
        (20, {"applied": False, "stop_request": EXIT_PREEMPTED}, [CHECKPOINTS]),
        (100, {"applied": False}, [CHECKPOINTS]),
    ],
)
def test_kinds_to_save(step: int, keys: dict[str, Any], kinds: list[str]) -> None:
    arguments = {"stop_request": 0, "applied": True, "is_best": False, **keys}
    assert kinds_to_save(step, **arguments, config=CONFIG) == kinds
    never = RunConfig(steps=1000, checkpoint_every=0, snapshot_every=0)
    assert kinds_to_save(step, 0, True, False, never) == []


def reduce_on_a_rank(rank: int) -> None:
    losses = [{"total": torch.tensor(4.0 * rank + micro), "koleo": torch.tensor(1.0)} for micro in (1, 3)]
    runtime: Any = SimpleNamespace(rank=rank, world_size=2)
    code = (SAVE, EXIT_PREEMPTED)[rank]
    norms = {"optim/gradient_norm": torch.tensor(3.0)}
    expected = {"koleo": 1.0, "total": 4.0}, EXIT_PREEMPTED, {"optim/gradient_norm": 3.0}
    assert read_results(losses, code, norms, runtime) == expected


def test_all_ranks_get_the_mean_losses_and_the_highest_stop_code(tmp_path: Path) -> None:
    run_on_ranks(reduce_on_a_rank, tmp_path)
