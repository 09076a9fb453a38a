"""``streamtrain evaluate``: compute the features of labelled images and measure a classifier on them."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from streamtrain.cli.backbone import choose_device, describe_backbone, load_selected_backbone
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.features import extract_features, pixel_features
from streamtrain.evaluation.images import LabelledImages, match_classes, open_images, split_images
from streamtrain.evaluation.knn import NEIGHBOURS, TEMPERATURE, knn_accuracy
from streamtrain.evaluation.linear import EPOCHS, linear_accuracy
from streamtrain.evaluation.logistic import PENALTIES, logistic_accuracy
from streamtrain.interop.folder import IMAGENET_MEAN, IMAGENET_STD
from streamtrain.run.progress import progress_bar

# default input size of the pixel baseline
PIXELS_SIZE = 32

Features = tuple[torch.Tensor, torch.Tensor]


def evaluate(arguments: argparse.Namespace) -> dict[str, str | int | float]:
    train_images, test_images = open_sets(arguments.train, arguments.test)
    began = time.perf_counter()
    source, train, test = features_of(arguments, train_images, test_images)
    result: dict[str, str | int | float] = {
        "task": arguments.task,
        **source,
        "train": str(arguments.train),
        "test": str(arguments.test or arguments.train),
        "train_images": len(train[1]),
        "test_images": len(test[1]),
        "classes": len(set(train[1].tolist())),
        "feature_dim": train[0].shape[1],
        "feature_seconds": round(time.perf_counter() - began, 3),
    }
    if arguments.task == "knn":
        accuracies = knn_accuracy(*train, *test)
        result["temperature"] = TEMPERATURE
        result |= {f"knn_{count}": accuracies[count] for count in NEIGHBOURS}
    elif arguments.task == "logistic":
        with progress_bar("logistic regression", len(PENALTIES) + 1, "fits") as bar:
            regression = logistic_accuracy(*train, *test, report=lambda done: bar.update(done - bar.n))
        result |= {"logistic": regression.accuracy, "penalty": regression.penalty}
    else:
        with progress_bar("linear probe", EPOCHS, "epoch") as bar:
            probe = linear_accuracy(*train, *test, report=lambda done: bar.update(done - bar.n))
        result |= {"linear": probe.accuracy, "learning_rate": probe.learning_rate}
    return result


def open_sets(train: Path, test: Path | None) -> tuple[LabelledImages, LabelledImages]:
    """Open the train and the test set; without a test set, split the train set."""
    if test is None:
        return split_images(open_images(train))
    opened = open_images(train)
    return opened, match_classes(opened, open_images(test))


def features_of(
    arguments: argparse.Namespace, train: LabelledImages, test: LabelledImages
) -> tuple[dict[str, str | int | float], Features, Features]:
    """Return a description of the features, and the features and labels of both sets."""
    size, resize, device = arguments.size, arguments.resize, choose_device(arguments.device)
    if arguments.pixels:
        if arguments.run or arguments.weights or arguments.untrained:
            raise StreamtrainError("--pixels uses no network; remove --run, --weights or --untrained")
        size = size or PIXELS_SIZE
        check_sizes(size, resize, 1)
        both = [
            pixel_features(images, size=size, mean=IMAGENET_MEAN, std=IMAGENET_STD, resize=resize, progress=True)
            for images in (train, test)
        ]
        return {"features": "pixels", "size": size}, both[0], both[1]
    backbone = load_selected_backbone(arguments)
    config = backbone.config
    size = size or config.image_size
    check_sizes(size, resize, config.model.patch_size)
    model = backbone.model.to(device)
    both = [
        extract_features(
            model, replace(images, background=config.background), size=size, mean=config.mean, std=config.std,
            resize=resize or config.resize_for(size), batch_size=arguments.batch, progress=True,
        )
        for images in (train, test)
    ]  # fmt: skip
    step = config.origin.get("step")
    described: dict[str, str | int | float] = {"features": describe_backbone(arguments), "size": size}
    return described | ({"step": step} if isinstance(step, int) else {}), both[0], both[1]


def check_sizes(size: int, resize: int | None, patch: int) -> None:
    """Raise StreamtrainError unless ``size`` is a multiple of ``patch``, and ``resize`` not smaller."""
    if size < 1 or size % patch:
        raise StreamtrainError(f"--size {size} is not a multiple of the patch size {patch}")
    if resize is not None and resize < size:
        raise StreamtrainError(f"--resize {resize} is smaller than the input of {size} pixels")
