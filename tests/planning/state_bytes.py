"""Print a rank's measured and planned model states after a step: ``state_bytes.py DTYPE MOMENTS FOLDER [LORA]``.

LORA is JSON of ``model.lora``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from streamtrain.config.load import build, merge
from streamtrain.engine.deepspeed_compat import shard_of
from streamtrain.engine.runtime import Launch, init_process_group
from streamtrain.planning.memory import STATES, plan
from streamtrain.training.build import Networks, restore

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))

from sharded_step import TEMPERATURE, WEIGHTS, batch_of, config_of


def main() -> None:
    dtype, moments, folder, *lora = sys.argv[1:]
    objective = {"anchor": {"weight": 1.0}}
    changes = {
        "objective": objective,
        "engine": {"moments": moments},
        "run": {"dir": folder},
        "model": {"lora": json.loads(*lora or ["{}"])},
    }
    raw = merge(config_of(dtype, "block", "1").model_dump(), changes)
    config, launch = build(raw), Launch.from_environment()
    with init_process_group(config.engine, launch) as runtime:
        networks = Networks.build(config, runtime)
        student, teacher, maker = networks.student, networks.teacher, networks.target_maker
        restore(config, None, student, teacher, maker, anchor=networks.anchor)
        batch = batch_of(config, 0, runtime.rank, 0)
        (target,) = maker.make([teacher.teacher_features(batch, WEIGHTS)], networks.teacher_prototypes, TEMPERATURE)
        target = replace(target, anchor=networks.anchor.targets(batch, 1.0))
        anchor = networks.anchor._network
        assert anchor is not None
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
            "frozen values": sum(shard_of(p).nbytes for p in student.frozen.values()),
            "masters": sum(0 if fp32 else flat.nbytes for flat in flats),
            "gradients": student._stage3.flat_gradients.nbytes,
            "teacher values": 0
            if fp32
            else sum(shard_of(teacher.parameters[name]).nbytes for name in student.parameters),
            "averages": sum(average.nbytes for average in teacher._ema),
        }
        scale = runtime.world_size if moments == "disk" else 1
        report["anchor"] = sum(shard_of(p).nbytes for p in anchor.own.values())
        report["moments"] = scale * sum(each.num_bytes() for each in every_moments if each is not None)
        if fp32:
            values = student._stage3.flat_values
            assert all(flat.data_ptr() == value.data_ptr() for flat, value in zip(flats, values, strict=True))
        planned = plan(config, runtime.world_size, on_gpu=False, bf16=not fp32)
        sizes = {part.name: part.num_bytes for part in planned.parts if part.name in (*STATES, "anchor")}
        # in fp32 the teacher's values are its EMA
        names = ("student values", "frozen values", "averages" if fp32 else "teacher values", "anchor")
        sizes["all values"] = sum(sizes.get(name, 0) for name in names)
        # of the three networks, each storage once
        every = [student.parameters, student.frozen, teacher.parameters, anchor.parameters]
        shards = [shard_of(parameter) for network in every for parameter in network.values()]
        stored = {shard.untyped_storage().data_ptr(): shard.untyped_storage().nbytes() for shard in shards}
        report["all values"] = sum(stored.values())
        empty = dict.fromkeys(("masters", "teacher values", "frozen values"), 0)
        print(json.dumps({**report, "planned": {**empty, **sizes}}), flush=True)


main()
