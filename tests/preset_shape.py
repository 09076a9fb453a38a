"""Settings of short runs whose network has the head width and patch size of the presets."""

HEAD = "{prototypes: 64, hidden: 64, bottleneck: 32}"
# patches of 16 pixels and heads of width 64, as in vits16; LayerScale is large, so that both blocks matter at once
SHAPE = (
    "model.preset=null", "model.dim=128", "model.depth=2", "model.num_heads=2", "model.layerscale=0.5",
    "crops.global_size=64", "crops.local_size=32", "crops.local_count=2",
    f"objective.global_loss.head={HEAD}", f"objective.patch_loss.head={HEAD}",
)  # fmt: skip
SHORT = (
    "run.steps=4", "run.checkpoint_every=2", "data.micro_batch=4", "data.lanes=2", "data.decode_threads=1",
    "engine.device=cpu", "engine.cpu_threads=1", "engine.dtype=fp32", "monitor.progress=false",
    "schedules.lr={peak: 1.0e-3, warmup: 0}", "schedules.freeze_last_layer=0", "schedules.teacher_temperature=0.04",
)  # fmt: skip
