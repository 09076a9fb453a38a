"""Run the forward of all networks in bf16 on CUDA tensors without values; prints JSON.

``fake_gpu_step.py LIBRARY CASE...``: a CASE is a recipe and settings, separated by spaces, or the name of a mutant.
LIBRARY lets a torch without CUDA index such tensors. Every operation is checked: its tensors are on one device, no
value is copied to the host, and no copy from it is blocking.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from streamtrain.config.load import load_config
from streamtrain.config.masks import max_rows
from streamtrain.config.section import ImageSize
from streamtrain.config.tree import Config
from streamtrain.data.batch import Batch, Masks
from streamtrain.data.masking import select_every_patch
from streamtrain.objective import feature_losses
from streamtrain.objective.gram import GramTargets
from streamtrain.objective.prototypes import PlainWeight, prototype_mass
from streamtrain.objective.targets import TargetMaker, TeacherPrototypes, view_pairs, view_weights
from streamtrain.ops import logits
from streamtrain.training import distill, ssl_model
from streamtrain.training.ssl_model import FrozenBackbone, LossWeights, SSLModel

CUDA = torch.device("cuda", 0)
# two blocks of the recipe's width; a few large chunks of prototypes
SMALL = ("model.depth=2", "data.shards=nowhere", "run.dir=nowhere", "objective.chunk_bytes=1GiB", "data.micro_batch=4")
SHORT = (torch.bfloat16, torch.float16)
# wider than any layer, narrower than the logits of any recipe
LOGITS = 20_000
READING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")


class OneDevice(TorchDispatchMode):
    """Collects what an operation should not do on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: Counter[str] = Counter()
        # operations by name and dtype of the first tensor
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(operation).removeprefix("aten.")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        # a scalar of the host is an argument of a kernel, unless it is an index
        devices = {each.device.type for each in tensors if each.dim() or "index" in name}
        self.operations[f"{name} {str(tensors[0].dtype).removeprefix('torch.')}" if tensors else name] += 1
        if name.split(".")[0] in READING:
            self.faults[f"{name} reads a value"] += 1
        is_copy = name.startswith(("_to_copy", "copy_"))
        if is_copy:
            target = torch.device(kwargs.get("device") or tensors[0].device).type
            source = tensors[-1].device.type
            if source != target and not (kwargs.get("non_blocking") or args[-1] is True):
                self.faults[f"{name} from {source} to {target} is blocking"] += 1
        elif len(devices) > 1:
            self.faults[f"{name} has tensors on {' and '.join(sorted(devices))}"] += 1
        result = operation(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.device.type != "cuda":
                self.faults[f"{name} makes a tensor on the {tensor.device.type}"] += 1
            if "mm" in name and tensor.dtype in SHORT and tensor.shape[-1] > LOGITS:
                self.faults[f"{name} makes 16-bit logits"] += 1
        return result


def batch_for(config: Config) -> Batch:
    """Return a micro-batch of the recipe's crops and masks."""
    sizes, count, local = config.crop_sizes[0], config.crops.global_count, config.crops.local_count
    images = config.data.micro_batch
    patches = sizes.global_size.patches(config.model.patch_size)

    def crops(number: int, size: ImageSize) -> torch.Tensor:
        return torch.empty(number * images, *size, 3, dtype=torch.uint8, device=CUDA)

    if config.teacher.kind == "frozen":
        masks = select_every_patch(count * images, patches, CUDA)
    else:
        rows = max_rows(config.masks, images, count, patches, 1)
        grid_mask = torch.zeros(count * images, patches, dtype=torch.bool, device=CUDA)
        index = torch.zeros(rows, dtype=torch.int64, device=CUDA)
        masks = Masks(grid_mask, index, torch.ones(rows, device=CUDA))
    gram_crops = crops(count, sizes.gram_size) if sizes.gram_size else None
    own = (crops(count, sizes.global_size), crops(local, sizes.local_size))
    return Batch(np.arange(images), *own, masks, gram_crops)


def build(network: Any, config: Config) -> Any:
    """Build a network in bf16 on the fake GPU."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with CUDA:
            return network(config)
    finally:
        torch.set_default_dtype(torch.float32)


def run(config: Config, teacher_config: Config) -> dict[str, Any]:
    """Run a step's forward; return faults, the losses' devices and dtypes, and the operations."""
    if config.teacher.kind == "frozen":
        with mock.patch.object(distill, "read_resolved", lambda folder: teacher_config):
            teacher_config = distill.frozen_teacher_config(config)
    weights, chunk_bytes = LossWeights(gram=1.0), config.objective.chunk_size(on_gpu=True)
    with OneDevice() as watched:
        student, teacher = build(SSLModel, config), build(SSLModel, teacher_config)
        gram = build(FrozenBackbone, config)
        batch = batch_for(config)
        # random parameters of the construction, and the batch, are not part of a step
        watched.faults.clear()
        watched.operations.clear()
        heads = (teacher.global_head, teacher.patch_head)
        prototypes = TeacherPrototypes(*(head and PlainWeight(head.prototypes.weight) for head in heads))
        features = teacher.teacher_features(batch, weights)
        maker = TargetMaker(config.objective)
        # centres exist from the second step on
        for _ in range(2):
            (targets,) = maker.make([features], prototypes, 0.05)
        assert features.global_features is not None
        mass = prototype_mass(features.global_features, prototypes.global_head, 0.05, chunk_bytes)
        settings, patch = config.objective.gram, config.model.patch_size
        crops = batch.global_crops if batch.gram_crops is None else batch.gram_crops
        grid = (batch.global_crops.shape[1] // patch, batch.global_crops.shape[2] // patch)
        level, negatives, tokens = settings.level, settings.negatives, settings.tokens
        asked = GramTargets(gram(crops, grid).patches, level, negatives, tokens, chunk_bytes)
        try:
            losses = student.student_losses(batch, replace(targets, gram=asked), weights)
        except RuntimeError as error:
            if not watched.faults:
                raise
            # a mutant
            return {"faults": watched.faults, "error": str(error)}
    made = {**losses, "mass": mass, **{f"center of {name}": value for name, value in maker.centers.items()}}
    return {
        "faults": watched.faults,
        "results": {name: f"{value.device} {value.dtype}" for name, value in made.items()},
        "operations": watched.operations,
    }


def run_case(case: str) -> dict[str, Any]:
    recipe, *settings = case.split(" ")
    config = load_config(recipe, [*SMALL, *settings])
    # of another size; used if the case has a frozen teacher
    frozen = load_config("vitl16.yaml", [*SMALL])
    return run(config, frozen if config.teacher.kind == "frozen" else config)


def main(library: str, *cases: str) -> None:
    if not torch.backends.cuda.is_built():
        ctypes.CDLL(library)

    class GeneratorOfCpu(torch.Generator):
        def __new__(cls, device: torch.device) -> torch.Generator:
            return super().__new__(cls, "cpu")

    rand, found = torch.rand, {}
    # random numbers of a GPU need its driver; one mode for all cases, because the product caches tensors of coordinates
    with (
        mock.patch.object(torch, "Generator", GeneratorOfCpu),
        mock.patch.object(torch, "rand", lambda *sizes, generator, device: rand(*sizes, device=device)),
        FakeTensorMode(),
    ):
        for case in cases:
            with MUTANTS[case] if case in MUTANTS else nullcontext():
                found[case] = run_case("vits16.yaml" if case in MUTANTS else case)
    print(json.dumps(found))


def read_a_value(features: torch.Tensor, neighbours: int) -> torch.Tensor:
    with suppress(DataDependentOutputException):
        features.sum().item()
    return features.float().sum()


MUTANTS = {
    "read": mock.patch.object(ssl_model, "koleo_loss", read_a_value),
    "loss in bf16": mock.patch.object(feature_losses, "at_least_fp32", lambda features: features),
    "logits in bf16": mock.patch.object(logits, "matmul", lambda left, right, out=None: torch.mm(left, right).float()),
    "indices on the host": mock.patch.object(
        ssl_model, "view_pairs", lambda *shape: view_pairs(*shape[:3], torch.device("cpu"))
    ),
    "blocking copy": mock.patch.object(
        ssl_model, "view_weights", lambda *shape: view_weights(*shape[:3], torch.device("cpu"), *shape[4:]).to(CUDA)
    ),
}


if __name__ == "__main__":
    main(*sys.argv[1:])
