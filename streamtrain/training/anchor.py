"""The anchor of a run: a frozen copy of the backbone that it started from, and its targets."""

from __future__ import annotations

from streamtrain.checkpoint.reader import CheckpointReader
from streamtrain.config.tree import Config
from streamtrain.data.batch import Batch
from streamtrain.engine.fragments import Shard
from streamtrain.engine.teacher import FrozenNetwork, Teacher
from streamtrain.errors import CheckpointError
from streamtrain.objective.anchor import AnchorTargets

KIND = "anchor"


class StartAnchor:
    """Holds the starting network; does nothing if ``network`` is None because the objective has no anchor.

    Checkpoints contain its values, because the file ``init.weights`` may change or move, and a run that began with
    ``--resume`` has none. Parameters that LoRA freezes are shared with the student, and are not saved a second time.
    """

    def __init__(self, config: Config, network: FrozenNetwork | None) -> None:
        self._config, self._network = config, network

    def start(self, teacher: Teacher, reader: CheckpointReader | None) -> None:
        """Fill the network.

        Args:
            teacher: source of the values in a new run.
            reader: source of the values in a resumed run, its own checkpoint; None for a new run.

        Raises:
            CheckpointError: if the run started without an anchor.
        """
        network = self._network
        if network is None:
            return
        if reader is None:
            # both networks are partitioned identically, so each rank has the values that it needs
            network.write(lambda name, _: teacher.ema_shard(name))
            return
        if not reader.has(f"{KIND}/{next(iter(network.own))}"):
            raise CheckpointError(
                f"checkpoint {reader.folder} has no anchor, because the run started without objective.anchor.weight; "
                "set it to 0, or start a new run.dir with --resume"
            )
        network.write(lambda name, fragment: reader.read(f"{KIND}/{name}", fragment))

    def targets(self, batch: Batch, weight: float) -> AnchorTargets | None:
        """Return the anchor's targets of a micro-batch; None if ``weight`` is 0 or there is no anchor."""
        if self._network is None or not weight:
            return None
        anchor, patch = self._config.objective.anchor, self._config.model.patch_size
        grid = (batch.global_crops.shape[1] // patch, batch.global_crops.shape[2] // patch)
        features = self._network(batch.global_crops, grid)
        return AnchorTargets(
            cls=features.cls if anchor.cls == "cosine" else None,
            patches=features.patches if anchor.patches != "none" else None,
            with_gram=anchor.patches == "gram",
            chunk_bytes=self._config.objective.chunk_size(on_gpu=features.cls.is_cuda),
        )

    def shards(self) -> dict[str, Shard]:
        """Return this rank's shards for a checkpoint by ``anchor/name``."""
        if self._network is None:
            return {}
        return {f"{KIND}/{name}": shard for name, shard in self._network.shards()}
