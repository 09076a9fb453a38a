"""Train DINOv3-style self-supervised vision transformers from streams of images.

    streamtrain.pack("photos", "sets/photos")
    streamtrain.train("vits16.yaml", shards="sets/photos", run="runs/photos", gpus=1, steps=10_000)
    backbone = streamtrain.load_backbone("runs/photos")
    features, keys = streamtrain.embed(backbone, "sets/photos")
    streamtrain.export("runs/photos", "exported", to="hf")

Importing the package loads neither torch nor any other library; each function imports its own when it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from streamtrain.api import embed, embed_files, evaluate, export, load_backbone, pack, train, verify
    from streamtrain.errors import StreamtrainError, TrainingError

__all__ = [
    "StreamtrainError",
    "TrainingError",
    "__version__",
    "embed",
    "embed_files",
    "evaluate",
    "export",
    "load_backbone",
    "pack",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from streamtrain import api, errors

    value = getattr(errors if name.endswith("Error") else api, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
