"""The quick start's comparison of kNN accuracies: which differences it reports, with and without stated margins."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "compare_accuracies.py"


def compare(folder: Path, *accuracies: float, test_images: int = 168, **keys: float) -> list[str]:
    """Return the lines printed for the accuracies of pixels, untrained and trained network."""
    paths = []
    for index, accuracy in enumerate(accuracies):
        result = {
            "knn_10": accuracy,
            "knn_20": 0.0,
            "train_images": 4 * test_images,
            "test_images": test_images,
            **keys,
        }
        paths.append(folder / f"{index}.log")
        paths[-1].write_text(f"kNN accuracy of something\n{json.dumps(result)}\n")
    done = subprocess.run([sys.executable, str(SCRIPT), *map(str, paths)], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_few_images_show_no_difference(tmp_path: Path) -> None:
    lines = compare(tmp_path, 0.464, 0.565, 0.53)
    assert [line.split() for line in lines[:3]] == [
        ["pixels", "46.4", "%", "±", "7.5"],
        ["untrained", "56.5", "%", "±", "7.5"],
        ["trained", "53.0", "%", "±", "7.5"],
    ]
    assert "on 168 test images" in lines[3] and "10.7 points" in lines[3]
    assert lines[4].endswith("trained and pixels: no difference can be seen on 168 test images")
    assert lines[5].endswith("trained and untrained: no difference can be seen on 168 test images")


def test_enough_images_show_which_network_is_better(tmp_path: Path) -> None:
    lines = compare(tmp_path, 0.47, 0.3, 0.42, test_images=4000)
    assert lines[4].endswith("pixels beats trained by 5.0 ± 2.2 points")
    assert lines[5].endswith("trained beats untrained by 12.0 ± 2.1 points")


@pytest.mark.parametrize(
    ("keys", "shown", "count"),
    [
        ({"margin_knn_10": 0.08}, "42.0 % ± 8.0", 168),
        ({"margin_knn_10": 0.08, "mean_knn_10": 0.4, "margin_mean_knn_10": 0.03}, "40.0 % ± 3.0", 840),
    ],
)
def test_margins_and_splits_of_the_evaluation_are_used(
    keys: dict[str, float], shown: str, count: int, tmp_path: Path
) -> None:
    lines = compare(tmp_path, 0.42, 0.42, 0.42, **keys)
    assert all(shown in line for line in lines[:3]) and f"on {count} test images" in lines[3]
