"""One rank of a kNN classification over several ranks: writes its predictions."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from streamtrain.evaluation.knn import Rows, knn_predict_over_ranks


def take_rows(features: np.ndarray, labels: np.ndarray, rank: int, world_size: int) -> Rows:
    """Return every ``world_size``-th row, padded to the same number on each rank."""
    own = torch.from_numpy(features[rank::world_size]), torch.from_numpy(labels[rank::world_size])
    missing = -(-len(features) // world_size) - len(own[0])
    return Rows(F.pad(own[0], (0, 0, 0, missing), value=1.0), F.pad(own[1], (0, missing), value=-1))


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    dist.init_process_group("gloo")
    data = np.load(folder / "features.npz")
    world_size = dist.get_world_size()
    train, test = (
        take_rows(data[name], data[labels], rank, world_size)
        for name, labels in (("train", "labels"), ("test", "test_labels"))
    )
    # small chunks, so that both sides are split
    predictions, expected = knn_predict_over_ranks(train, test, chunk_bytes=2**22)
    arrays = {f"knn_{count}": guess.numpy() for count, guess in predictions.items()}
    np.savez(folder / f"predictions-{rank}.npz", expected=expected.numpy(), **arrays)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
