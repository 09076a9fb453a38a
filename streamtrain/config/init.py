"""Where a new run's backbone comes from."""

from __future__ import annotations

from pydantic import model_validator

from streamtrain.config.section import Probability, Section, Steps

ENOUGH = 0.95


class InitConfig(Section):
    """``init``: all of it affects results. A run that has a checkpoint, or is started with --resume, ignores it."""

    # a backbone: a Hugging Face folder of a DINOv3 ViT, timm's folder, an export, run or checkpoint of ours, or a
    # .safetensors or torch file with the names of any of them; null: drawn from run.seed. Heads are always drawn.
    weights: str | None = None
    # share of the backbone's tensors that the weights must provide; below it the run does not start
    minimum_matched: Probability = ENOUGH
    # lr of the backbone is 0 for so many first steps, while fresh heads settle
    freeze_backbone_steps: Steps = 0

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> InitConfig:
        if self.weights is None and self.minimum_matched != ENOUGH:
            raise ValueError("minimum_matched has an effect only with weights")
        return self
