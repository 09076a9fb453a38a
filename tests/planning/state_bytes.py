"""What a rank's model states really take after a step, beside the plan: ``state_bytes.py DTYPE MOMENTS FOLDER``."""

from __future__ import annotations

import json
import sys

from sharded_step import TEMPERATURE, WEIGHTS, batch_of, config_of

from streamtrain.config.load import build, merge
from streamtrain.engine.runtime import Launch, joined
from streamtrain.objective.targets import TargetMaker, TeacherPrototypes
from streamtrain.planning.memory import STATES, plan
from streamtrain.training.build import build_networks, restore


def main() -> None:
    dtype, moments, folder = sys.argv[1:]
    raw = merge(config_of(dtype, "block", "1").model_dump(), {"engine": {"moments": moments}, "run": {"dir": folder}})
    config, launch = build(raw), Launch.from_environment()
    with joined(config.engine, launch) as runtime:
        student, teacher = build_networks(config, runtime, 1)
        maker = TargetMaker(config.objective)
        restore(config, None, student, teacher, maker)
        handles = TeacherPrototypes(*(teacher.weight(f"{h}.prototypes.weight") for h in ("global_head", "patch_head")))
        batch = batch_of(config, 0, runtime.rank, 0)
        (target,) = maker.make([teacher.teacher_features(batch, WEIGHTS)], handles, TEMPERATURE)
        student.set_rates(1e-3, 0.0, last_layer_frozen=False)
        student.accumulate(batch, target, WEIGHTS)
        student.step()
        teacher.update(0.9)

        fp32 = dtype == "fp32"
        flats = student.master_groups
        every_moments = [student._adamw.moments(flat) for flat in flats]
        report = {
            "student values": sum(p.ds_tensor.nbytes for p in student.parameters.values()),
            # in fp32 the same memory
            "masters": sum(0 if fp32 else flat.nbytes for flat in flats),
            "gradients": student._optimizer.grad_partitions_flat_buffer.nbytes,
            "teacher values": 0 if fp32 else sum(p.ds_tensor.nbytes for p in teacher.parameters.values()),
            "averages": sum(average.nbytes for average in teacher._averages),
        }
        scale = runtime.world_size if moments == "disk" else 1
        report["moments"] = scale * sum(each.num_bytes() for each in every_moments if each is not None)
        if fp32:
            values = student._optimizer.fp16_partitioned_groups_flat
            assert all(flat.data_ptr() == value.data_ptr() for flat, value in zip(flats, values, strict=True))
        planned = plan(config, runtime.world_size, on_gpu=False, bf16=not fp32)
        sizes = {part.name: part.num_bytes for part in planned.parts if part.name in STATES}
        empty = dict.fromkeys(("masters", "teacher values"), 0)
        print(json.dumps({**report, "planned": {**empty, **sizes}}), flush=True)


main()
