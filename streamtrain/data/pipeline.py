"""The DALI graph: encoded images in, and out come their crops (on a GPU) or the decoded images (on a CPU).

DALI draws nothing itself: every parameter is an input, so a rebuilt pipeline repeats its batches bit for bit. An
image is decoded once; a flip is a crop box whose left and right are exchanged, which costs nothing. The decoder
applies the EXIF orientation, and the sizes in the index are those of the upright image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types

from streamtrain.config.crops import CropsConfig, CropSizes
from streamtrain.data.augment import ViewParameters

Device = Literal["cpu", "gpu"]

class CropPipeline:
    """Feeds batches into the graph and takes their crops or images out, in order.

    Before the first are taken, exactly ``prefetch`` batches must have been fed; from then on one for each
    taken. After an error the object is dead, as DALI's pipelines are: make another and feed it again.
    """

    def __init__(
        self,
        crops: CropsConfig,
        batch_size: int,
        sizes: Sequence[CropSizes],
        *,
        device: Device,
        device_id: int | None,
        threads: int,
        prefetch: int,
        cropping: bool,
    ) -> None:
        """Build the graph.

        Args:
            sizes: all that the batches may have.
            device_id: the GPU's number; None for ``device="cpu"``.
            threads: DALI's own.
            cropping: whether crops come out, or the images.
        """
        self._cropping, self._batch_size = cropping, batch_size
        self._sized = cropping and len(sizes) > 1
        self._to_start = prefetch
        self._pipeline: Pipeline = _graph(
            crops,
            device,
            cropping,
            tuple(sizes),
            batch_size=batch_size,
            num_threads=threads,
            device_id=device_id,
            prefetch_queue_depth=prefetch,
        )
        self._pipeline.build()

    def feed(self, payloads: Sequence[npt.NDArray[np.uint8]], views: ViewParameters, sizes: CropSizes) -> None:
        """Give work on B encoded images (uint8 [num_bytes] each) that become crops of ``sizes``; returns at once."""
        self._pipeline.feed_input("payload", list(payloads))
        if self._cropping:
            roi_start, roi_end = _flipped_boxes(views)
            self._pipeline.feed_input("roi_start", roi_start)
            self._pipeline.feed_input("roi_end", roi_end)
        if self._sized:
            for name, size in asdict(sizes).items():
                if size:
                    self._pipeline.feed_input(name, np.full((self._batch_size, 2), size, np.float32))
        # DALI's first run takes as many batches as it prefetches, and fails on one that is not there yet
        self._to_start = max(0, self._to_start - 1)
        if self._to_start == 0:
            self._pipeline.schedule_run()

    def take(self, cuda_stream: torch.cuda.Stream | None = None) -> list[Any]:
        """What has become of the oldest batch fed and not yet taken: DALI ``TensorList``s of uint8.

        With ``cropping`` one a view, [B, size, size, 3], the Gram teacher's last; else one of the images, B times
        [height, width, 3]. They are bound to ``cuda_stream`` where one is given, and valid until ``release``.

        Raises:
            RuntimeError: an image of the batch could not be decoded.
        """
        return list(self._pipeline.share_outputs(cuda_stream))

    def release(self) -> None:
        """Give the buffers taken last back to DALI."""
        self._pipeline.release_outputs()


def _flipped_boxes(views: ViewParameters) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    flipped = views.mirror.astype(bool)
    roi_start, roi_end = views.roi_start.copy(), views.roi_end.copy()
    roi_start[flipped, 1], roi_end[flipped, 1] = views.roi_end[flipped, 1], views.roi_start[flipped, 1]
    return roi_start, roi_end


@pipeline_def
def _graph(crops: CropsConfig, device: Device, cropping: bool, sizes: tuple[CropSizes, ...]) -> tuple[Any, ...]:
    payload = fn.external_source(name="payload", dtype=types.UINT8, ndim=1)
    image = fn.decoders.image(payload, device="mixed" if device == "gpu" else "cpu", output_type=types.RGB)
    if not cropping:
        return (image,)
    roi_start = fn.external_source(name="roi_start", dtype=types.FLOAT, ndim=2)
    roi_end = fn.external_source(name="roi_end", dtype=types.FLOAT, ndim=2)
    of_kind = {
        # several sizes alternate as an input; a single one is part of the graph
        name: [size, size] if len(sizes) == 1 else fn.external_source(name=name, dtype=types.FLOAT, ndim=1)
        for name, size in asdict(sizes[0]).items()
        if size
    }
    of_global = [(view, of_kind["global_size"]) for view in range(crops.global_count)]
    of_local = [(crops.global_count + view, of_kind["local_size"]) for view in range(crops.local_count)]
    of_gram = [(view, of_kind["gram_size"]) for view in range(crops.global_count) if "gram_size" in of_kind]
    return tuple(
        fn.resize(
            image,
            size=size,
            roi_start=roi_start[view],
            roi_end=roi_end[view],
            roi_relative=True,
            interp_type=types.INTERP_CUBIC,
            antialias=True,
        )
        for view, size in (*of_global, *of_local, *of_gram)
    )


def undecodable(payload: npt.NDArray[np.uint8]) -> str | None:
    """Why DALI cannot decode one encoded image uint8 [num_bytes], or None if it can; slow, for finding culprits."""
    # its own small world: a pipeline would be dead after the first failure
    from nvidia.dali.experimental import dynamic

    if len(payload) == 0:
        return "is empty"
    try:
        dynamic.decoders.image(dynamic.tensor(payload), device="cpu", output_type=types.RGB).evaluate()
    except RuntimeError:
        # what DALI says here names no cause, the decoder's own words go to stderr
        return "cannot be decoded; it is damaged or of an unknown format"
    return None
