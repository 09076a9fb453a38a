"""The predicted time of recipes on GPUs, and of published runs beside their figures, as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from streamtrain.config.load import load_config
from streamtrain.config.tree import Config
from streamtrain.planning.hardware import DEFAULT_HARDWARE, Hardware
from streamtrain.planning.peak import gpu_of_option
from streamtrain.planning.time import PARTS, Region, StepTime, mfu, predict, smallest_hiding_micro_batch

# logits of all prototypes at once, as in the published code
WHOLE = "objective.chunk_bytes=8589934592"
PLAIN = ("engine.checkpointing=none", "model.num_registers=0", WHOLE)


@dataclass(frozen=True)
class PublishedRun:
    """A published throughput, and the nearest configuration of ours."""

    name: str
    recipe: str
    overrides: tuple[str, ...]
    gpu: str
    gpus: int
    # Gbit/s per GPU between hosts
    network: float
    # of one GPU
    images_per_second: float

    def config(self) -> Config:
        return load_config(self.recipe, self.overrides, self.gpus)

    def hardware(self) -> Hardware:
        # the published loader is not modelled
        return Hardware(gpu_of_option(self.gpu), self.network * 1e9 / 8, loader=1e9)

    def predicted(self) -> float:
        """Return the predicted images/s of one GPU."""
        return throughput(self.config(), self.gpus, predict(self.config(), self.gpus, self.hardware()))

    def error(self) -> float:
        """Return the relative error of the prediction."""
        return self.predicted() / self.images_per_second - 1


# Sources: README and configs/ of github.com/facebookresearch/dinov2 and dinov3; Siméoni et al. 2025. Images/s follow
# from steps, batch, GPUs and duration.
PUBLISHED = (
    # vitl16_short.yaml: 125 000 steps of 2 048 on 32 A100 in "approximately 1 day"; centring, no compilation
    PublishedRun(
        "DINOv2 ViT-L/16", "vitl16.yaml",
        ("data.micro_batch=64", "data.global_batch=2048", *PLAIN, "engine.compile=off", "objective.centering=softmax"),
        "a100", 32, 200, 92.6,
    ),
    # vitl14.yaml: 625 000 steps of 3 072 on 96 A100 in "approximately 3.3 days"; fused SwiGLU of 2 736
    PublishedRun(
        "DINOv2 ViT-L/14", "vitl16.yaml",
        ("data.micro_batch=32", "data.global_batch=3072", *PLAIN, "engine.compile=off", "model.patch_size=14",
         "crops.local_size=98", "model.drop_path=0.4", "model.mlp=swiglu", "model.mlp_hidden=2736",
         "objective.global_loss.head.prototypes=131072", "objective.global_loss.head.bottleneck=384",
         "objective.patch_loss.head.prototypes=131072"),
        "a100", 96, 200, 70.1,
    ),
    # vitl_im1k_lin834.yaml: "0.57s/iter" of 2 048 on 32 GPUs of the cluster RSC, which has A100s; compiled
    PublishedRun(
        "DINOv3 ViT-L/16", "vitl16.yaml", ("data.micro_batch=64", "data.global_batch=2048", *PLAIN), "a100", 32, 200,
        112.3,
    ),
    # the same configuration in the README: 125 000 steps on 32 H100 in "approximately 14 hours"
    PublishedRun(
        "DINOv3 ViT-L/16", "vitl16.yaml", ("data.micro_batch=64", "data.global_batch=2048", *PLAIN), "h100", 32, 400,
        158.7,
    ),
    # dinov3_vit7b16_pretrain.yaml, 61 440 GPU-hours for 1 M steps of 4 096 on 256 H100: FP8, compiled; checkpointing
    # saves every matmul
    PublishedRun(
        "DINOv3 7B", "giant.yaml", ("engine.fp8=true", "engine.checkpointing=none", WHOLE), "h100", 256, 400, 18.5
    ),
)  # fmt: skip

# network, recipe, ranks
RECIPES = (("ViT-S/16", "vits16.yaml", 8), ("ViT-B/16", "vitb16.yaml", 8), ("ViT-L/16", "vitl16.yaml", 8))
MICRO_BATCHES = (16, 64)
# the default on a CPU
SMALL_CHUNKS = "objective.chunk_bytes=8MiB"
# causes of the time; these recipes neither offload nor wait for the assumed loader
SHOWN = tuple(part for part in PARTS if part not in ("transfer", "loader"))


def throughput(config: Config, world_size: int, time: StepTime) -> float:
    """Return the images/s of one GPU."""
    images, _ = config.batch_split(world_size)
    return images / world_size / time.seconds


def published_table() -> str:
    """Return the published and predicted throughput as a Markdown table."""
    lines = [
        "| run | GPUs | published (images/s per GPU) | predicted (images/s per GPU) | error (%) |",
        "|---|---|---|---|---|",
    ]
    for run in PUBLISHED:
        gpus = f"{run.gpus} {gpu_of_option(run.gpu).name}"
        rates = f"{run.images_per_second:.3g} | {run.predicted():.3g}"
        lines.append(f"| {run.name} | {gpus} | {rates} | {100 * run.error():+.0f} |")
    return "\n".join(lines)


def cases() -> list[tuple[str, int, Config, Config]]:
    """Return name, GPUs, configuration, and the configuration with smaller chunks of prototypes, of each table row."""
    listed = [
        (name, recipe, ranks, [f"data.micro_batch={size}", "data.global_batch=null"])
        for name, recipe, ranks in RECIPES
        for size in MICRO_BATCHES
    ]
    listed += [("7B", "giant.yaml", 256, []), ("7B, FP8", "giant.yaml", 256, ["engine.fp8=true"])]
    return [
        (name, ranks, load_config(recipe, overrides, ranks), load_config(recipe, [*overrides, SMALL_CHUNKS], ranks))
        for name, recipe, ranks, overrides in listed
    ]


def recipe_table() -> str:
    """Return the predicted throughput of recipes on H100s and its causes as a Markdown table."""
    names = " | ".join(f"{name} (%)" for name in SHOWN)
    lines = [
        f"| network | GPUs | micro-batch | images/s per GPU | MFU (%) | {names} | network hidden from micro-batch |",
        "|---|" + "---|" * (5 + len(SHOWN)),
    ]
    for name, ranks, config, _ in cases():
        time = predict(config, ranks, DEFAULT_HARDWARE)
        shares = " | ".join(f"{100 * time.parts[part] / time.seconds:.0f}" for part in SHOWN)
        utilisation = 100 * mfu(config, ranks, DEFAULT_HARDWARE, time.seconds)
        lines.append(
            f"| {name} | {ranks} | {config.data.micro_batch} | {throughput(config, ranks, time):.3g} | "
            f"{utilisation:.0f} | {shares} | {smallest_hiding_micro_batch(config, ranks, DEFAULT_HARDWARE) or 'none'} |"
        )
    return "\n".join(lines)


def savings_table() -> str:
    """Return the share of a step on H100s that would be saved without some of its work, as a Markdown table."""
    rows = [(name, config, _savings(config, smaller, ranks)) for name, ranks, config, smaller in cases()]
    lines = [
        "| network | micro-batch | " + " | ".join(f"{column} (%)" for column in rows[0][2]) + " |",
        "|---|" + "---|" * (1 + len(rows[0][2])),
    ]
    for name, config, saved in rows:
        shares = " | ".join(f"{100 * share:.0f}" for share in saved.values())
        lines.append(f"| {name} | {config.data.micro_batch} | {shares} |")
    return "\n".join(lines)


def _savings(config: Config, smaller: Config, world_size: int) -> dict[str, float]:
    """Return the share of a step that the default chunks of prototypes save, and if some of its work took no time."""
    before = predict(smaller, world_size, DEFAULT_HARDWARE).seconds
    time = predict(config, world_size, DEFAULT_HARDWARE)

    def without(change: Callable[[Region], Region]) -> float:
        changed = replace(time, regions=tuple(change(region) for region in time.regions))
        return 1 - changed.seconds / time.seconds

    def drop(*words: str) -> float:
        return without(lambda region: region * (0.0 if any(word in region.name for word in words) else 1.0))

    def no_memory(region: Region) -> Region:
        is_block = region.name.partition(",")[0] in ("attention", "mlp")
        return replace(region, memory=0.0) if is_block else region

    return {
        "chunks of 128 MiB, not 8": 1 - time.seconds / before,
        "hooks and compiled calls": without(lambda region: replace(region, host=0.0)),
        "memory-bound kernels of blocks": without(no_memory),
        "prototype losses": drop("loss"),
        "targets": drop("targets"),
        "heads": drop("head"),
        "AdamW and EMA": drop("AdamW", "EMA"),
    }


def run() -> dict[str, Any]:
    """Print the tables of docs/performance.md; return the largest absolute error of a published run."""
    print(published_table(), recipe_table(), savings_table(), sep="\n\n", end="\n\n")
    return {"largest_error": max(abs(run.error()) for run in PUBLISHED)}
