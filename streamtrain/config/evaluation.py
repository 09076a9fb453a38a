"""The ``evaluation`` section: evaluation on held-out images during training."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from streamtrain.config.section import PathText, Probability, Section, Steps, free

# evaluators of maps, and the kind of map that each needs
DENSE = {"segmentation": "seg", "depth": "depth"}
# metrics of each evaluator, below eval/, that are highest at the best checkpoint; not an error such as depth_rmse
METRICS = {
    "knn": ("knn_10", "knn_20"), "linear": ("linear",), "patches": ("patch_retrieval",),
    "segmentation": ("segmentation_knn_miou", "segmentation_linear_miou"), "depth": ("depth_delta1",),
}  # fmt: skip


class EvaluationConfig(Section):
    """Evaluation of the EMA teacher on held-out images; affects no result."""

    every: Steps = free(1000, "Steps between evaluations; 0: never.")
    evaluators: tuple[Literal["knn", "linear", "patches", "segmentation", "depth"], ...] = free(
        ("knn", "segmentation", "depth"), "Tasks to measure. knn and linear: classification with k-NN or a linear "
        "layer. patches: retrieval of the patches of an enlarged, mirrored view. segmentation and depth: only for "
        "images that were packed with maps.",
    )  # fmt: skip
    train: PathText | None = free(
        None, "Labelled training images: a shard set or a folder of class subfolders; null: data.shards if labelled."
    )
    test: PathText | None = free(None, "Labelled test images; null: a held-out part of the training images.")
    images: int = free(2000, "Maximum number of training images; at most a quarter as many test images.", ge=8)
    max_share: Probability = free(
        0.05, "Skip an evaluation when evaluations have taken a larger share of the run's time."
    )
    best: str | None = free(
        None, "Keep the checkpoint with the highest value of this metric, such as knn_20; null: no such checkpoint."
    )

    reference: PathText | None = free(
        None, "Images that are not trained on, labelled or not: a shard set or a folder. Each evaluation also measures "
        "on them how far the network has moved from the start.",
    )  # fmt: skip
    stop_if_below: Probability | None = free(
        None, "For runs from trained weights: save a checkpoint and stop with exit code 3 if the kNN accuracy falls "
        "below this share of the accuracy at the start. The accuracy is knn_20, on evaluation.reference if given. "
        "null: never.",
    )  # fmt: skip

    @model_validator(mode="after")
    def _check_names(self) -> EvaluationConfig:
        if self.test is not None and self.train is None:
            raise ValueError("test needs train")
        if self.stop_if_below is not None and not (self.every and "knn" in self.evaluators):
            raise ValueError("stop_if_below needs knn among the evaluators, and every above 0")
        if len(set(self.evaluators)) < len(self.evaluators):
            raise ValueError(f"evaluators has duplicates: {', '.join(self.evaluators)}")
        if self.best is not None:
            metrics = [metric for name in self.evaluators for metric in METRICS[name]]
            if self.best not in metrics:
                known = ", ".join(metrics) or "none"
                raise ValueError(f"best {self.best!r} is not a metric of the evaluators; they measure: {known}")
        return self
