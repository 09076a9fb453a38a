"""Manifests for checkpoint directories that a test writes itself."""

from __future__ import annotations

from pathlib import Path

from streamtrain.run.atomic_io import compute_checksum
from streamtrain.run.step_manifest import MANIFEST_NAME, CheckpointManifest


def seal(folder: Path) -> None:
    """Write the manifest of all files in the directory, replacing an older one."""
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    CheckpointManifest({path.name: compute_checksum(path) for path in sorted(folder.iterdir())}).write(folder)
