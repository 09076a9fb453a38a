"""Print a rank's measured and planned model states after a step: ``state_bytes.py DTYPE MOMENTS FOLDER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from streamtrain.config.load import build, merge
from streamtrain.engine.deepspeed_compat import shard_of
from streamtrain.engine.runtime import Launch, init_process_group
from streamtrain.objective.targets import TargetMaker, TeacherPrototypes
from streamtrain.planning.memory import STATES, plan
from streamtrain.training.build import build_networks, restore

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))

from sharded_step import TEMPERATURE, WEIGHTS, batch_of, config_of


def main() -> None:
    dtype, moments, folder = sys.argv[1:]
    raw = merge(config_of(dtype, "block", "1").model_dump(), {"engine": {"moments": moments}, "run": {"dir": folder}})
    config, launch = build(raw), Launch.from_environment()
    with init_process_group(config.engine, launch) as runtime:
        student, teacher = build_networks(config, runtime, 1)
        maker = TargetMaker(config.objective)
        restore(config, None, student, teacher, maker)
        heads = ("global_head", "patch_head")
        teacher_prototypes = TeacherPrototypes(*(teacher.weight(f"{head}.prototypes.weight") for head in heads))
        batch = batch_of(config, 0, runtime.rank, 0)
        (target,) = maker.make([teacher.teacher_features(batch, WEIGHTS)], teacher_prototypes, TEMPERATURE)
        student.set_rates(1e-3, 0.0, last_layer_frozen=False)
        student.accumulate(batch, target, WEIGHTS)
        student.step()
        teacher.update(0.9)

        fp32 = dtype == "fp32"
        flats = student.master_groups
        every_moments = [student._adamw.moments(flat) for flat in flats]
        report = {
            "student values": sum(shard_of(p).nbytes for p in student.parameters.values()),
            # in fp32 the values are the masters
            "masters": sum(0 if fp32 else flat.nbytes for flat in flats),
            "gradients": student._stage3.flat_gradients.nbytes,
            "teacher values": 0 if fp32 else sum(shard_of(p).nbytes for p in teacher.parameters.values()),
            "averages": sum(average.nbytes for average in teacher._ema),
        }
        scale = runtime.world_size if moments == "disk" else 1
        report["moments"] = scale * sum(each.num_bytes() for each in every_moments if each is not None)
        if fp32:
            values = student._stage3.flat_values
            assert all(flat.data_ptr() == value.data_ptr() for flat, value in zip(flats, values, strict=True))
        planned = plan(config, runtime.world_size, on_gpu=False, bf16=not fp32)
        sizes = {part.name: part.num_bytes for part in planned.parts if part.name in STATES}
        empty = dict.fromkeys(("masters", "teacher values"), 0)
        print(json.dumps({**report, "planned": {**empty, **sizes}}), flush=True)


main()
