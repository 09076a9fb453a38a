"""The whole configuration: one frozen tree, checked across its sections."""

from __future__ import annotations

from pydantic import model_validator

from streamtrain.config.crops import CropsConfig
from streamtrain.config.data import DataConfig
from streamtrain.config.engine import EngineConfig, OptimConfig, TeacherConfig
from streamtrain.config.init import InitConfig
from streamtrain.config.masks import MasksConfig
from streamtrain.config.model import ModelConfig
from streamtrain.config.monitor import MonitorConfig
from streamtrain.config.objective import ObjectiveConfig
from streamtrain.config.run import RunConfig
from streamtrain.config.schedules import SchedulesConfig
from streamtrain.config.section import Section
from streamtrain.errors import ConfigError


class Config(Section):
    """Everything a run is made from; saved resolved as ``config.yaml`` in the run folder."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    crops: CropsConfig = CropsConfig()
    masks: MasksConfig = MasksConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    teacher: TeacherConfig = TeacherConfig()
    optim: OptimConfig = OptimConfig()
    schedules: SchedulesConfig = SchedulesConfig()
    engine: EngineConfig = EngineConfig()
    monitor: MonitorConfig = MonitorConfig()
    init: InitConfig = InitConfig()

    @model_validator(mode="after")
    def _sizes_fit_patches(self) -> Config:
        patch = self.model.patch_size
        for name in ("global_size", "local_size"):
            size = getattr(self.crops, name)
            if size % patch:
                raise ValueError(f"crops.{name} {size} is not a multiple of model.patch_size {patch}")
        return self

    def batch_split(self, world_size: int) -> tuple[int, int]:
        """``(global_batch, accumulation)`` for ``world_size`` ranks.

        Raises:
            ConfigError: if micro-batch x ranks does not divide the global batch.
        """
        micro = self.data.micro_batch * world_size
        total = self.data.global_batch or micro
        if total % micro:
            raise ConfigError(
                f"data.global_batch {total} is not a multiple of data.micro_batch {self.data.micro_batch} x "
                f"{world_size} ranks = {micro}; set data.global_batch or data.micro_batch so that it is"
            )
        return total, total // micro
