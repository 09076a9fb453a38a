"""Write only the trained parameters of a backbone with LoRA adapters."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save

from shards.format.files import write_whole
from streamtrain.checkpoint.reader import iterate_weights
from streamtrain.config.load import read_resolved
from streamtrain.errors import StreamtrainError
from streamtrain.interop.load import PREFIX, find_checkpoint
from streamtrain.planning.shapes import is_trained
from streamtrain.run.directory import parse_step


def export_adapters(run_dir: Path, step: int | str | None, which: str, out: Path) -> int:
    """Write the adapters of a run to the safetensors file ``out``, and return the number of their parameters.

    Each adapted layer ``NAME`` has ``NAME.lora_a`` and ``NAME.lora_b``. Blocks that train whole
    (``model.lora.free_blocks``) are included. The header has the settings of the model and the adapters, and the path
    of the frozen weights.

    Args:
        step: the checkpoint's step, or ``best``; None: the latest.
        which: ``teacher`` or ``student``.

    Raises:
        StreamtrainError: if the run has no adapters or no such checkpoint, or ``out`` is not a new file.
        OSError: if ``out`` cannot be written.
    """
    if out.suffix != ".safetensors" or out.exists():
        raise StreamtrainError(f"--out {out} must be a new file with the suffix .safetensors")
    config = read_resolved(run_dir)
    if not config.model.lora.rank:
        raise StreamtrainError(f"{run_dir} has no adapters (model.lora.rank is 0): export its backbone with --to")
    step = parse_step(find_checkpoint(run_dir, step, which))
    trained = iterate_weights(
        run_dir, step, which, lambda name: name.startswith(PREFIX) and is_trained(name, config.model)
    )
    tensors = {name.removeprefix(PREFIX): value for name, value in trained}
    header = {
        "lora": {**config.model.lora.model_dump(mode="json"), "scale": config.model.lora.scale},
        "model": config.model.model_dump(mode="json", exclude={"lora"}),
        "origin": {
            "source": which,
            "step": step,
            "run": config.run.dir,
            "base": config.init.weights,
            "channels": config.init.channels,
        },
    }
    write_whole(out, save(tensors, {"format": "pt", **{key: json.dumps(value) for key, value in header.items()}}))
    return sum(value.numel() for value in tensors.values())
