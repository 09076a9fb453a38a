#!/usr/bin/env python3
"""How good are the features? kNN accuracy or a linear probe on labelled images, with frozen weights.

python tools/evaluate.py knn --run RUN --train SET [--test SET] [--json]
python tools/evaluate.py linear --weights W --train SET --test SET
python tools/evaluate.py knn --pixels --train SET

SET is a shard set or a folder of class subfolders. Without --test, a fixed fifth of --train, the same for every
network and every run, is held out for testing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from backbone_arguments import add_backbone_arguments, load_backbone
from tqdm import tqdm

from shards.errors import ShardError
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.features import extract_features, pixel_features
from streamtrain.evaluation.images import LabelledImages, match_classes, open_images, split_images
from streamtrain.evaluation.knn import NEIGHBOURS, TEMPERATURE, knn_accuracy
from streamtrain.evaluation.linear import linear_accuracy
from streamtrain.export.folder import IMAGENET_MEAN, IMAGENET_STD

PIXELS_SIZE = 32  # of the raw-pixel baseline, unless --size says another

Features = tuple[torch.Tensor, torch.Tensor]


def main() -> int:
    arguments = parse_arguments()
    try:
        result = evaluate(arguments)
    except (StreamtrainError, ShardError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(readable(result))
    if arguments.json:
        print(json.dumps(result))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("knn", "linear"))
    add_backbone_arguments(parser)
    parser.add_argument("--pixels", action="store_true", help="no network: the pixels themselves as features")
    parser.add_argument("--train", type=Path, required=True, metavar="SET", help="labelled images to learn from")
    parser.add_argument("--test", type=Path, metavar="SET", help="labelled images to predict")
    parser.add_argument("--size", type=int, help="side of the input in pixels (default: as in training)")
    parser.add_argument("--resize", type=int, help="shorter side before the centre crop (default: --size)")
    parser.add_argument("--batch", type=int, default=64, help="images at a time (default 64)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", action="store_true", help="print one flat JSON object last")
    return parser.parse_args()


def evaluate(arguments: argparse.Namespace) -> dict[str, str | int | float]:
    """The result as one flat object."""
    train_images, test_images = open_sets(arguments.train, arguments.test)
    began = time.perf_counter()
    source, train, test = features_of(arguments, train_images, test_images)
    result: dict[str, str | int | float] = {
        "task": arguments.task,
        **source,
        "train": str(arguments.train),
        "test": str(arguments.test or arguments.train),
        "train_images": len(train_images),
        "test_images": len(test_images),
        "classes": len(set(train_images.labels.tolist())),
        "feature_dim": train[0].shape[1],
        "feature_seconds": round(time.perf_counter() - began, 3),
    }
    if arguments.task == "knn":
        accuracies = knn_accuracy(*train, *test)
        result["temperature"] = TEMPERATURE
        result |= {f"knn_{count}": accuracies[count] for count in NEIGHBOURS}
    else:
        with tqdm(desc="linear probe", unit="epoch") as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            probe = linear_accuracy(*train, *test, report=show)
        result |= {"linear": probe.accuracy, "learning_rate": probe.learning_rate}
    return result


def open_sets(train: Path, test: Path | None) -> tuple[LabelledImages, LabelledImages]:
    """The two sets, or the fixed split of the one."""
    if test is None:
        return split_images(open_images(train))
    opened = open_images(train)
    return opened, match_classes(opened, open_images(test))


def features_of(
    arguments: argparse.Namespace, train: LabelledImages, test: LabelledImages
) -> tuple[dict[str, str | int | float], Features, Features]:
    """What made the features, and the features and labels of both sets."""
    size, resize = arguments.size, arguments.resize
    if arguments.pixels:
        if arguments.run or arguments.weights or arguments.untrained:
            raise StreamtrainError("--pixels is a baseline without a network: give no --run, --weights or --untrained")
        size = size or PIXELS_SIZE
        check_sizes(size, resize, 1)
        both = [
            pixel_features(images, size=size, mean=IMAGENET_MEAN, std=IMAGENET_STD, resize=resize, progress=True)
            for images in (train, test)
        ]
        return {"features": "pixels", "size": size}, both[0], both[1]
    backbone = load_backbone(arguments)
    config = backbone.config
    size = size or config.image_size
    check_sizes(size, resize, config.model.patch_size)
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = backbone.model.to(device)
    both = [
        extract_features(
            model, images, size=size, mean=config.mean, std=config.std, resize=resize,
            batch_size=arguments.batch, progress=True,
        )
        for images in (train, test)
    ]  # fmt: skip
    step = config.origin.get("step")
    described: dict[str, str | int | float] = {"features": describe(arguments), "size": size}
    return described | ({"step": step} if isinstance(step, int) else {}), both[0], both[1]


def check_sizes(size: int, resize: int | None, patch: int) -> None:
    if size < 1 or size % patch:
        raise StreamtrainError(f"--size {size} is not a multiple of the patch size {patch}")
    if resize is not None and resize < size:
        raise StreamtrainError(f"--resize {resize} is smaller than the input of {size} pixels")


def describe(arguments: argparse.Namespace) -> str:
    if arguments.untrained:
        return "untrained"
    return "weights" if arguments.weights else "student" if arguments.student else "teacher"


def readable(result: dict[str, str | int | float]) -> str:
    """One line: what was measured on what."""
    if result["task"] == "knn":
        scores = ", ".join(f"k={count} {result[f'knn_{count}']:.2%}" for count in NEIGHBOURS)
        scores = f"kNN accuracy {scores}"
    else:
        scores = f"linear probe accuracy {result['linear']:.2%} (learning rate {result['learning_rate']:g})"
    step = f" at step {result['step']}" if "step" in result and result["features"] != "untrained" else ""
    return (
        f"{scores}: {result['features']}{step}, {result['size']} px, {result['train_images']} train and "
        f"{result['test_images']} test images, {result['classes']} classes"
    )


if __name__ == "__main__":
    sys.exit(main())
