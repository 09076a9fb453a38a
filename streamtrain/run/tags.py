"""Title, unit and description of each scalar of ``metrics.jsonl`` and TensorBoard, by tag. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote


@dataclass(frozen=True)
class Tag:
    """Names of a scalar for people; programs use the tag itself.

    Attributes:
        title: a few words, for charts.
        description: one sentence.
        unit: ``share`` (0..1, shown in per cent), ``bytes``, ``seconds``, another unit, or empty.
        is_logarithmic: its values may span decades.
    """

    title: str
    description: str
    unit: str = ""
    is_logarithmic: bool = False

    @property
    def text(self) -> str:
        """The description with the unit."""
        return f"{self.description} Unit: {self.unit}." if self.unit else self.description


_GRADIENT = "Norm of the gradient of {} before clipping."
_STEP_SECONDS = "{} of the step time over the last 200 steps."

TAGS = {
    "loss/total": Tag("Loss", "Weighted sum of the loss terms; lower is not always better.", "nats", True),
    "loss/global": Tag("Global loss", "Cross-entropy between student and teacher on whole views.", "nats", True),
    "loss/patch": Tag("Masked-patch loss", "Unweighted loss on masked patches.", "nats", True),
    "loss/koleo": Tag("KoLeo loss", "Unweighted KoLeo term: low where the features spread evenly."),
    "loss/gram": Tag("Gram loss", "Unweighted difference to the patch similarities of the Gram teacher.", "", True),
    "loss/distil_cls": Tag("CLS distillation loss", "Unweighted distance to the feature teacher's CLS.", "", True),
    "loss/distil_local": Tag(
        "Local CLS distillation loss", "Unweighted distance of local crops to the feature teacher's CLS.", "", True
    ),
    "loss/distil_patch": Tag(
        "Patch distillation loss", "Unweighted distance to the feature teacher's patches.", "", True
    ),
    "loss/anchor": Tag("Anchor loss", "Unweighted distance of features to the starting network's.", "", True),
    "eval/knn_10": Tag("kNN accuracy (k = 10)", "Share of held-out images classified right by 10 neighbours.", "share"),
    "eval/knn_20": Tag("kNN accuracy (k = 20)", "Share of held-out images classified right by 20 neighbours.", "share"),
    "eval/linear": Tag(
        "Linear probe accuracy", "Share of held-out images classified right by a linear layer.", "share"
    ),
    "eval/patch_retrieval": Tag(
        "Patch retrieval", "Share of patches matched between an image and its enlarged, mirrored view.", "share"
    ),
    "eval/segmentation_knn_miou": Tag(
        "mIoU of kNN", "Mean IoU of classes of pixels by the nearest neighbours of their patch.", "share"
    ),
    "eval/segmentation_linear_miou": Tag(
        "mIoU of a linear layer", "Mean IoU of classes of pixels by a linear layer on patch features.", "share"
    ),
    "eval/depth_rmse": Tag(
        "Depth RMSE", "Root mean squared error of the depth by a linear layer on patch features.", "units of depth"
    ),
    "eval/depth_delta1": Tag(
        "Depth within 1.25", "Share of pixels whose depth is wrong by a factor below 1.25.", "share"
    ),
    "eval/unusable_images": Tag("Unusable evaluation images", "Evaluation images left out as unusable.", "images"),
    "eval/seconds": Tag("Duration of an evaluation", "Duration of the evaluation.", "seconds"),
    "eval/time_share": Tag("Time for evaluation", "Share of the time since the start spent on evaluation.", "share"),
    "features/rank": Tag(
        "Rank of the features", "Effective rank of the teacher's CLS features; a fall towards 1 is a collapse."
    ),
    "features/std": Tag(
        "Spread of the features", "0 if the features of all images are equal, 1 for random directions."
    ),
    "teacher/entropy": Tag(
        "Entropy of the assignments", "From 0 (one prototype per image) to log(prototypes) (no distinction).", "nats"
    ),
    "teacher/prototype_usage": Tag(
        "Prototypes in use", "Prototypes nearest to some image, as a share of the possible number.", "share"
    ),
    "teacher/momentum": Tag("Teacher momentum", "Scheduled weight of the previous teacher in the EMA."),
    "teacher/temperature": Tag("Teacher temperature", "Scheduled temperature of the targets."),
    "optim/lr": Tag("Learning rate", "Scheduled learning rate before the multipliers of parameter groups."),
    "optim/weight_decay": Tag("Weight decay", "Scheduled weight decay."),
    "optim/gradient_norm": Tag("Gradient norm", _GRADIENT.format("all parameters"), "", True),
    "optim/gradient_norm/backbone": Tag("Gradient norm, backbone", _GRADIENT.format("the backbone"), "", True),
    "optim/gradient_norm/global_head": Tag("Gradient norm, global head", _GRADIENT.format("this head"), "", True),
    "optim/gradient_norm/patch_head": Tag("Gradient norm, patch head", _GRADIENT.format("this head"), "", True),
    "optim/gradient_norm/projector": Tag("Gradient norm, projector", _GRADIENT.format("the projector"), "", True),
    "optim/skipped_steps": Tag(
        "Skipped steps", "Total steps skipped because a loss or gradient was not finite.", "steps"
    ),
    "watch/collapse": Tag("Signs of collapse", "Collapse metrics outside their bounds for a while.", "metrics"),
    "watch/loss_z": Tag("Loss outlier score", "Robust z-score of the loss among recent steps.", "standard deviations"),
    "speed/images_per_second": Tag("Speed", "Images trained on per second, over all ranks.", "images/s"),
    "speed/tokens_per_second": Tag("Tokens per second", "Tokens of the student, over all ranks.", "tokens/s"),
    "speed/model_flops_per_second": Tag("Model FLOP/s", "Model FLOPs per second, without recomputation.", "FLOP/s"),
    "speed/mfu": Tag("Model FLOPs utilization", "Model FLOPs as a share of the devices' peak.", "share"),
    "speed/step_seconds": Tag("Step time", "Time from the end of a step to the end of the next.", "seconds"),
    "speed/step_seconds_p50": Tag("Step time, median", _STEP_SECONDS.format("Median"), "seconds"),
    "speed/step_seconds_p90": Tag("Step time, 90th percentile", _STEP_SECONDS.format("90th percentile"), "seconds"),
    "speed/step_seconds_p99": Tag("Step time, 99th percentile", _STEP_SECONDS.format("99th percentile"), "seconds"),
    "speed/all_gather_seconds": Tag("All-gather time", "All-gather time of a step without overlap.", "seconds"),
    "speed/checkpoint_seconds": Tag("Checkpoint duration", "Duration of the latest checkpoint.", "seconds"),
    "speed/checkpoint_stall_seconds": Tag(
        "Wait for checkpoints", "Time that training waited for the checkpoint.", "seconds"
    ),
    "speed/monitor_share": Tag(
        "Time for monitoring", "Share of the time since the start spent on metrics and pictures.", "share"
    ),
    "data/wait_share": Tag("Wait for images", "Share of the step spent waiting for images.", "share"),
    "data/pixel_mean": Tag("Mean of the inputs", "Mean of the normalised pixels; near 0 if crops.mean fits."),
    "data/pixel_std": Tag("Spread of the inputs", "Standard deviation of the normalised pixels; near 1 if it fits."),
    "data/pixel_structure": Tag(
        "Structure of the inputs", "Correlation of pixels an eighth of a crop apart; near 0 in noise."
    ),
    "data/view_correlation": Tag(
        "Correlation of views", "Of the detail in two crops of an image; near 0 if all images are equal."
    ),
    "data/quarantined": Tag("Unusable training images", "Total unusable training images of rank 0.", "images"),
    "data/downloaded_bytes": Tag("Downloaded", "Total bytes downloaded by rank 0.", "bytes"),
    "data/retries": Tag("Retries of reads", "Total repeated reads of remote storage by rank 0.", "reads"),
    "data/cache_hit_share": Tag("Cache hits", "Share of shard opens served by the cache.", "share"),
    "memory/rss_bytes": Tag("Host memory", "Resident memory of rank 0.", "bytes"),
    "memory/peak_rss_bytes": Tag("Host memory, peak", "Peak resident memory of rank 0.", "bytes"),
    "memory/gpu_bytes": Tag("GPU memory, peak", "Peak memory of the GPU of rank 0.", "bytes"),
}


_ON_REFERENCE = (("", ""), ("reference/", " on the reference"))
for _metric in (
    "knn_10", "knn_20", "linear", "patch_retrieval", "segmentation_knn_miou", "segmentation_linear_miou", "depth_rmse",
    "depth_delta1",
):  # fmt: skip
    _tag = TAGS[f"eval/{_metric}"]
    TAGS[f"reference/{_metric}"] = Tag(f"{_tag.title} on the reference", _tag.description, _tag.unit)
    for _prefix, _suffix in _ON_REFERENCE:
        _title = f"{_tag.title}{_suffix}"
        TAGS[f"drift/{_prefix}{_metric}"] = Tag(
            f"{_title}, change", f"{_title} minus its value at the start.", _tag.unit
        )
for _prefix, _suffix in _ON_REFERENCE:
    TAGS |= {
        f"drift/{_prefix}cka": Tag(
            f"CKA with the start{_suffix}",
            "Linear CKA of CLS features with the start; 1 for equal or rotated features.",
        ),
        f"drift/{_prefix}distance": Tag(
            f"Distance from the start{_suffix}", "Mean of 1 - cosine similarity of CLS features to the start."
        ),
    }


# metrics of evaluations, the most telling first, with short names for the progress
HEADLINES = {
    "eval/knn_20": "kNN", "eval/knn_10": "kNN", "eval/linear": "linear probe", "eval/patch_retrieval": "patches",
    "eval/segmentation_knn_miou": "kNN mIoU", "eval/segmentation_linear_miou": "linear mIoU", "eval/depth_delta1": "δ1",
}  # fmt: skip


def pinned_cards_url(tags: Sequence[str]) -> str:
    """Return the address of a local TensorBoard with the scalars ``tags`` on top of its first page."""
    cards = [{"plugin": "scalars", "tag": tag} for tag in tags]
    return f"http://localhost:6006/?pinnedCards={quote(json.dumps(cards, separators=(',', ':')), safe='')}#timeseries"


def describe_tag(tag: str) -> Tag:
    """Return title, unit and description of a tag; the title of an unknown tag is the tag."""
    return TAGS.get(tag) or Tag(tag, "")
