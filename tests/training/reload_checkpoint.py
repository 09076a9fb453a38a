"""Load a run's newest checkpoint on these ranks and write its values: ``reload_checkpoint.py RUN OUT MOMENTS``."""

from __future__ import annotations

import sys
from pathlib import Path

from streamtrain.checkpoint.writer import CheckpointPayload, CheckpointWriter
from streamtrain.config.load import build, merge, read_resolved
from streamtrain.engine.runtime import Launch, init_process_group
from streamtrain.objective.targets import TargetMaker
from streamtrain.run.directory import CHECKPOINTS
from streamtrain.training.build import build_networks, restore
from streamtrain.training.gram import GramAnchor

run_dir, out, moments = sys.argv[1:]
changes = {"engine": {"moments": moments, "moments_dir": f"{out}/moments" if moments == "disk" else None}}
config = build(merge(read_resolved(run_dir).model_dump(), changes))
with init_process_group(config.engine, Launch.from_environment()) as runtime:
    student, teacher = build_networks(config, runtime, 1)
    maker = TargetMaker(config.objective)
    position = restore(config, None, student, teacher, maker, GramAnchor(config, None))
    shapes = {name: fragment.shape for name, fragment in student.fragments.items()}
    shards = student.shards() | teacher.shards()
    Path(out).mkdir(exist_ok=True)
    writer = CheckpointWriter(Path(out), config.run)
    payload = CheckpointPayload(shards, maker.state_dict(), shapes, {"data": position.data})
    writer.save(position.step, {CHECKPOINTS: payload})
    writer.wait()
    assert writer.failure is None, writer.failure
