"""The Gram teacher of a run: its initial values, refreshes and targets (Siméoni et al. 2025, section 4)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from streamtrain.checkpoint.reader import CheckpointReader
from streamtrain.config.model import is_adapter
from streamtrain.config.tree import Config
from streamtrain.data.batch import Batch
from streamtrain.engine.fragments import Fragment, Shard
from streamtrain.engine.teacher import FrozenNetwork, Teacher
from streamtrain.errors import StreamtrainError
from streamtrain.interop.feature_teacher import check_stated_model
from streamtrain.interop.load_pretrained import load_pretrained_backbone
from streamtrain.interop.naming import KINDS
from streamtrain.interop.patch_embedding import RgbAdaptation
from streamtrain.objective.gram import GramTargets

BACKBONE = "backbone."
KIND = "gram"
# parameters that do not affect the features of unmasked global crops
_UNUSED = ("embedding.mask_token", *(f"{norm}.{part}" for norm in ("cls_norm", "local_norm") for part in KINDS))


class GramAnchor:
    """Holds the Gram teacher; does nothing if ``network`` is None because the objective has no Gram term."""

    def __init__(self, config: Config, network: FrozenNetwork | None) -> None:
        self._config, self._network = config, network
        self._filled = False

    def start(self, reader: CheckpointReader | None) -> None:
        """Fill the network from a checkpoint or ``objective.gram.teacher``; with ``ema`` the first refresh fills it.

        Raises:
            StreamtrainError: if ``objective.gram.teacher`` is not a backbone of this model.
        """
        if self._network is None:
            return
        if reader is not None and reader.has(f"{KIND}/{next(iter(self._network.parameters))}"):
            self._network.write(lambda name, fragment: reader.read(f"{KIND}/{name}", fragment))
            self._filled = True
        elif self._config.objective.gram.teacher != "ema":
            self._read_weights(self._network, Path(self._config.objective.gram.teacher))
            self._filled = True

    def refresh(self, step: int, weight: float, teacher: Teacher, before: Callable[[], None]) -> None:
        """Copy the teacher if a refresh is due after ``step`` completed steps; ``before`` is called first."""
        is_due = self._config.objective.gram.refresh.is_due(step) or (weight > 0 and not self._filled)
        if self._network is not None and is_due:
            before()
            # partitioned identically, so that no rank needs another rank's values
            self._network.write(lambda name, _: teacher.ema_shard(name))
            self._filled = True

    def targets(self, batch: Batch, weight: float) -> GramTargets | None:
        """Return the Gram targets of a micro-batch; None if the term has no weight."""
        if self._network is None or not weight:
            return None
        gram, patch = self._config.objective.gram, self._config.model.patch_size
        grid = (batch.global_crops.shape[1] // patch, batch.global_crops.shape[2] // patch)
        crops = batch.global_crops if batch.gram_crops is None else batch.gram_crops
        features = self._network(crops, grid).patches
        chunk_bytes = self._config.objective.chunk_size(on_gpu=features.is_cuda)
        return GramTargets(features, gram.level, gram.negatives, gram.tokens, chunk_bytes)

    def shards(self) -> dict[str, Shard]:
        """Return this rank's shards for a checkpoint by ``gram/name``; none before the network is filled."""
        if self._network is None or not self._filled:
            return {}
        return {f"{KIND}/{name}": shard for name, shard in self._network.shards()}

    def _read_weights(self, network: FrozenNetwork, path: Path) -> None:
        # its adapters stay 0
        shapes = {
            name.removeprefix(BACKBONE): torch.Size(one.shape)
            for name, one in network.fragments.items()
            if not is_adapter(name)
        }
        init, setting = self._config.init, "objective.gram.teacher"
        adaptation = RgbAdaptation(init.channels, self._config.model.channels, is_needed=init.weights is None)
        with load_pretrained_backbone(path, shapes, setting=setting, adaptation=adaptation) as (read, report):
            missing = [name for name in (*report.missing, *report.reshaped) if name not in _UNUSED]
            if missing:
                raise StreamtrainError(f"{setting} {path} has no {', '.join(missing[:5])}")
            check_stated_model(path, self._config.model, setting)

            def value(name: str, fragment: Fragment) -> torch.Tensor:
                tensor = read(name.removeprefix(BACKBONE))
                return torch.zeros(fragment.numel) if tensor is None else fragment.cut(tensor)

            network.write(value)
