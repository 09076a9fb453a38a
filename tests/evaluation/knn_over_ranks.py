"""One rank of a classification whose features lie on several: writes what it found."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from streamtrain.evaluation.knn import Rows, knn_predict_over_ranks


def part(features: np.ndarray, labels: np.ndarray, rank: int, world_size: int) -> Rows:
    """Every ``world_size``-th row, and as many on each rank."""
    own = torch.from_numpy(features[rank::world_size]), torch.from_numpy(labels[rank::world_size])
    missing = -(-len(features) // world_size) - len(own[0])
    return Rows(F.pad(own[0], (0, 0, 0, missing), value=1.0), F.pad(own[1], (0, missing), value=-1))


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    dist.init_process_group("gloo")
    data = np.load(folder / "features.npz")
    world_size = dist.get_world_size()
    train, test = (
        part(data[name], data[labels], rank, world_size)
        for name, labels in (("train", "labels"), ("test", "test_labels"))
    )
    # so little room that both sides are cut into pieces
    predictions, wanted = knn_predict_over_ranks(train, test, chunk_bytes=2**22)
    found = {f"knn_{count}": guess.numpy() for count, guess in predictions.items()}
    np.savez(folder / f"found-{rank}.npz", wanted=wanted.numpy(), **found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
