"""The ``init`` section: initial weights of a new run."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from streamtrain.config.section import PathText, Probability, Section, Steps, accept, free

DEFAULT_MINIMUM = 0.95
ChannelRule = Literal["refuse", "repeat", "mean", "zero_extra"]


class InitConfig(Section):
    """Initial weights. Ignored by a run that has a checkpoint or is started with ``--resume``."""

    weights: PathText | None = free(
        None, "Pretrained backbone of a DINOv3 ViT: a Hugging Face or timm folder, an export, run or checkpoint of "
        "streamtrain, or a .safetensors or torch file with the tensor names of one of these. null: random weights. "
        "Heads always start with random weights.",
    )  # fmt: skip
    minimum_matched: Probability = free(
        DEFAULT_MINIMUM, "Smallest share of the backbone's tensors that the weights must provide for the run to start."
    )
    channels: ChannelRule = free(
        "refuse", "How to use RGB weights for images of other channels, also in objective.gram.teacher. refuse: raise "
        "an error. The other values set the kernels of the patch embedding. mean: the sum of the three kernels, "
        "divided by the number of channels. repeat: red, green, blue, red, ..., each divided by its number of copies. "
        "zero_extra: red, green, blue, then 0. repeat and zero_extra need at least 3 channels.",
    )  # fmt: skip
    freeze_backbone_steps: Steps = accept(
        0, "First steps of the run in which the backbone has learning rate 0, while the heads adapt."
    )

    @model_validator(mode="after")
    def _reject_ineffective_keys(self) -> InitConfig:
        if self.weights is None and self.minimum_matched != DEFAULT_MINIMUM:
            raise ValueError("minimum_matched has an effect only with weights")
        return self
