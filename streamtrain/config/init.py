"""The ``init`` section: initial weights of a new run."""

from __future__ import annotations

from pydantic import model_validator

from streamtrain.config.section import PathText, Probability, Section, Steps, accept, free

DEFAULT_MINIMUM = 0.95


class InitConfig(Section):
    """Initial weights. Ignored by a run that has a checkpoint or is started with ``--resume``."""

    weights: PathText | None = free(
        None, "Pretrained backbone: a Hugging Face folder of a DINOv3 ViT, a timm folder, a streamtrain export, run or "
        "checkpoint, or a .safetensors or torch file with the tensor names of one of them; null: random weights. Heads "
        "always start with random weights.",
    )  # fmt: skip
    minimum_matched: Probability = free(
        DEFAULT_MINIMUM, "Smallest share of the backbone's tensors that the weights must provide for the run to start."
    )
    freeze_backbone_steps: Steps = accept(
        0, "First steps of the run in which the backbone has learning rate 0, while the heads adapt."
    )

    @model_validator(mode="after")
    def _reject_ineffective_keys(self) -> InitConfig:
        if self.weights is None and self.minimum_matched != DEFAULT_MINIMUM:
            raise ValueError("minimum_matched has an effect only with weights")
        return self
