"""What a run has written to its event files, read back."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)


def latest_images(folder: Path) -> dict[str, tuple[int, bytes]]:
    """The last image of each tag in a folder of event files: its step and the bytes of its PNG."""
    if not folder.is_dir():
        return {}
    events = EventAccumulator(str(folder), size_guidance={"images": 1, "scalars": 1, "histograms": 1, "tensors": 1})
    events.Reload()
    found = {tag: events.Images(tag)[-1] for tag in events.Tags()["images"]}
    return {tag: (image.step, image.encoded_image_string) for tag, image in found.items()}
