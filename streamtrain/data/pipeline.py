"""The DALI graph: encoded images in, crops (on a GPU) or decoded images (on a CPU) out.

DALI draws no random numbers: every parameter is an input, so a rebuilt pipeline repeats its batches bit for bit. Each
image is decoded once. A flip is a crop box with two sides exchanged, at no cost. The decoder applies the EXIF
orientation, and the index stores the sizes of upright images. Images that DALI would decode to other pixels arrive
decoded (``shards.format.decode``) and join the others before the crops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types

from shards.format.decode import Array
from shards.format.pixels import RGB, PixelFormat
from streamtrain.config.crops import CropsConfig, CropSizes
from streamtrain.data.augment import ViewParameters

Device = Literal["cpu", "gpu"]

_NONE_DECODED: Mapping[int, Array] = MappingProxyType({})
_DALI_TYPES = {"uint8": types.UINT8, "uint16": types.UINT16, "float32": types.FLOAT}
_NO_PIXELS = np.zeros((1, 1, 3), np.uint8)
# DALI needs an encoded image in every row: a PNG of one grey pixel
_PLACEHOLDER = np.frombuffer(
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x00\x00\x00\x00:~\x9bU\x00\x00\x00\nIDATx\x9cch\x00\x00\x00\x82\x00\x81w\xcdr\xb6\x00\x00\x00\x00IEND\xaeB`\x82",
    np.uint8,
)


class CropPipeline:
    """A queue of batches through the DALI graph, first in, first out.

    Feed exactly ``prefetch`` batches before taking the first; from then on, feed one for each batch taken. After an
    error a DALI pipeline cannot be used again: build a new one and feed it the same batches.
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
        pixels: PixelFormat = RGB,
    ) -> None:
        """Build the graph.

        Args:
            sizes: all crop sizes that batches may have.
            device_id: index of the GPU; None for ``device="cpu"``.
            threads: number of DALI threads.
            cropping: whether to output crops; otherwise the decoded images.
            pixels: of the images. DALI decodes 8-bit RGB only; all other images arrive decoded.
        """
        self._cropping, self._batch_size, self._is_rgb = cropping, batch_size, pixels.is_rgb
        self._has_size_inputs = cropping and len(sizes) > 1
        self._num_unscheduled = prefetch
        self._pipeline: Pipeline = _build_graph(
            crops,
            device,
            cropping,
            tuple(sizes),
            pixels,
            batch_size=batch_size,
            num_threads=threads,
            device_id=device_id,
            prefetch_queue_depth=prefetch,
        )
        self._pipeline.build()

    def feed(
        self,
        payloads: Sequence[npt.NDArray[np.uint8]],
        views: ViewParameters,
        sizes: CropSizes,
        decoded: Mapping[int, Array] = _NONE_DECODED,
    ) -> None:
        """Queue B encoded images (uint8 [num_bytes] each) to be cropped to ``sizes``; return immediately.

        Args:
            decoded: images [height, width, channels] by row, in place of the encoded ones. Only crops are made of them:
                without ``cropping``, the output of these rows has no meaning.
        """
        encoded = [_PLACEHOLDER if row in decoded else payload for row, payload in enumerate(payloads)]
        if self._is_rgb or not self._cropping:
            self._pipeline.feed_input("payload", encoded)
        if self._cropping:
            rows = range(len(payloads))
            if self._is_rgb:
                self._pipeline.feed_input("is_decoded", np.array([row in decoded for row in rows]))
            self._pipeline.feed_input("decoded", [decoded.get(row, _NO_PIXELS) for row in rows], layout="HWC")
            roi_start, roi_end = _exchange_flipped_sides(views)
            self._pipeline.feed_input("roi_start", roi_start)
            self._pipeline.feed_input("roi_end", roi_end)
        if self._has_size_inputs:
            for name, size in vars(sizes).items():
                if size:
                    self._pipeline.feed_input(name, np.full((self._batch_size, 2), size, np.float32))
        # DALI's first run consumes all prefetched batches and fails if one is missing
        self._num_unscheduled = max(0, self._num_unscheduled - 1)
        if self._num_unscheduled == 0:
            self._pipeline.schedule_run()

    def take(self, cuda_stream: torch.cuda.Stream | None = None) -> list[Any]:
        """Return the output of the oldest batch in the queue as DALI ``TensorList``s.

        With ``cropping``, one list per view, [B, height, width, channels], the Gram teacher's views last; else one list
        of B images uint8 [height, width, 3]. Crops are uint8, or float32 for images of another dtype. They are ordered
        on ``cuda_stream`` if given, and valid until ``release``.

        Raises:
            RuntimeError: an image of the batch could not be decoded.
        """
        return list(self._pipeline.share_outputs(cuda_stream))

    def release(self) -> None:
        """Return the buffers of the last ``take`` to DALI."""
        self._pipeline.release_outputs()


def _exchange_flipped_sides(views: ViewParameters) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    roi_start, roi_end = views.roi_start.copy(), views.roi_end.copy()
    for axis, flips in enumerate((views.vertical, views.mirror)):
        flipped = flips.astype(bool)
        roi_start[flipped, axis], roi_end[flipped, axis] = views.roi_end[flipped, axis], views.roi_start[flipped, axis]
    return roi_start, roi_end


@pipeline_def(enable_conditionals=True)
def _build_graph(
    crops: CropsConfig, device: Device, cropping: bool, sizes: tuple[CropSizes, ...], pixels: PixelFormat = RGB
) -> tuple[Any, ...]:
    payload = fn.external_source(name="payload", dtype=types.UINT8, ndim=1)
    options: dict[str, Any] = {"device": "cpu", "output_type": types.RGB}
    if device == "gpu":
        # As the decoder of a CPU interpolates colours. By default the hardware would decode a part of each batch, to
        # other pixels.
        options |= {"device": "mixed", "jpeg_fancy_upsampling": True, "hw_decoder_load": 0.0}
    if not cropping:
        return (fn.decoders.image(payload, **options),)
    decoded = fn.external_source(name="decoded", dtype=_DALI_TYPES[pixels.dtype], layout="HWC")
    if pixels.is_rgb:
        is_decoded = fn.external_source(name="is_decoded", dtype=types.BOOL, ndim=0)
        if is_decoded:  # DALI splits the batch
            image = decoded.gpu() if device == "gpu" else decoded
        else:
            image = fn.decoders.image(payload, **options)
    else:
        image = decoded.gpu() if device == "gpu" else decoded
    roi_start = fn.external_source(name="roi_start", dtype=types.FLOAT, ndim=2)
    roi_end = fn.external_source(name="roi_end", dtype=types.FLOAT, ndim=2)
    size_inputs = {
        # one size is a constant of the graph; several sizes alternate through an input
        name: list(size) if len(sizes) == 1 else fn.external_source(name=name, dtype=types.FLOAT, ndim=1)
        for name, size in vars(sizes[0]).items()
        if size
    }
    global_views = [(view, size_inputs["global_size"]) for view in range(crops.global_count)]
    local_views = [(crops.global_count + view, size_inputs["local_size"]) for view in range(crops.local_count)]
    gram_views = [(view, size_inputs["gram_size"]) for view in range(crops.global_count) if "gram_size" in size_inputs]
    return tuple(
        fn.resize(
            image,
            size=size,
            roi_start=roi_start[view],
            roi_end=roi_end[view],
            roi_relative=True,
            interp_type=types.INTERP_CUBIC,
            antialias=True,
            dtype=None if pixels.dtype == "uint8" else types.FLOAT,
        )
        for view, size in (*global_views, *local_views, *gram_views)
    )
