"""What is tried on held-out images while a run trains."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from streamtrain.config.section import Probability, Section, Steps

# what each evaluator measures, by the names below eval/
METRICS = {"knn": ("knn_10", "knn_20"), "linear": ("linear",), "patches": ("patch_retrieval",)}


class EvaluationConfig(Section):
    """``evaluation``: affects no result; the teacher is evaluated as it lies, in shards."""

    # steps between two evaluations; 0: never
    every: Steps = 1000
    evaluators: tuple[Literal["knn", "linear", "patches"], ...] = ("knn",)
    # labelled images to learn from, a shard set or a folder of class subfolders; null: those of data.shards, if any
    train: str | None = None
    # labelled images to predict; null: a part of the former that is held out
    test: str | None = None
    # images of train at most; of test a quarter as many
    images: int = Field(default=2000, ge=8)
    # the share of a run's time beyond which an evaluation that is due is left out
    max_share: Probability = 0.05
    # what is to be highest, such as knn_20: the checkpoint of that step stays; null: none
    best: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> EvaluationConfig:
        if self.test is not None and self.train is None:
            raise ValueError("test needs train")
        if len(set(self.evaluators)) < len(self.evaluators):
            raise ValueError(f"evaluators has one twice: {', '.join(self.evaluators)}")
        if self.best is not None:
            metrics = [metric for name in self.evaluators for metric in METRICS[name]]
            if self.best not in metrics:
                known = ", ".join(metrics) or "there are none"
                raise ValueError(f"best {self.best!r} is nothing that the evaluators measure: {known}")
        return self
