"""The DALI graph: encoded images and view parameters in, uint8 views out; one graph for CPU and GPU.

DALI draws nothing itself: every parameter is an input, so a rebuilt pipeline repeats its batches bit for bit.
Order of operations as in DINO: crop, flip, colour, grey, blur, solarize. What differs from Pillow's habits:

* the flip is a crop box whose left and right are exchanged, which costs nothing;
* ``color_twist`` is one linear map in a luma-chroma space (hue and saturation, then contrast about 128, then
  brightness) and rounds once, where Pillow turns the hue in HSV, takes contrast about the mean, mixes the four in
  random order and clips after each; grey is saturation 0 of the same map;
* a blur's window reaches 3 sigma, at most 4 pixels: the window of 9 that the reference always uses, without its
  zeros;
* the EXIF orientation is applied by the decoder, and sizes in the index are those of the upright image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from nvidia.dali import Pipeline, fn, pipeline_def, types

from streamtrain.config.crops import CropsConfig
from streamtrain.data.augment import NO_SOLARIZE, ViewParameters

Device = Literal["cpu", "gpu"]

MAX_BLUR_RADIUS = 4
# the graph's inputs beside the images: (name, dtype, dimensions of one sample's array)
_INPUTS = (
    ("roi_start", types.FLOAT, 2),
    ("roi_end", types.FLOAT, 2),
    ("color", types.FLOAT, 2),
    ("twisted", types.BOOL, 1),
    ("sigma", types.FLOAT, 1),
    ("window", types.INT32, 1),
    ("solarize", types.INT32, 1),
)


class ViewPipeline:
    """Feeds batches into the graph and takes their views out, in order.

    Before the first views are taken, exactly ``prefetch`` batches must have been fed; from then on one for each
    taken. After an error the object is dead, as DALI's pipelines are: make another and feed it again.
    """

    def __init__(
        self, crops: CropsConfig, batch_size: int, *, device: Device, device_id: int | None, threads: int, prefetch: int
    ) -> None:
        """``device_id`` is the GPU's number, None for ``device="cpu"``; ``threads`` are DALI's own."""
        self._pipeline: Pipeline = _graph(
            crops,
            device,
            batch_size=batch_size,
            num_threads=threads,
            device_id=device_id,
            prefetch_queue_depth=prefetch,
        )
        self._pipeline.build()
        self._to_start = prefetch

    def feed(self, payloads: Sequence[npt.NDArray[np.uint8]], views: ViewParameters) -> None:
        """Give work on B encoded images (uint8 [num_bytes] each); returns at once."""
        pipeline = self._pipeline
        pipeline.feed_input("payload", list(payloads))
        for name, value in _inputs(views).items():
            pipeline.feed_input(name, value)
        # DALI's first run takes as many batches as it prefetches, and fails on one that is not there yet
        self._to_start = max(0, self._to_start - 1)
        if self._to_start == 0:
            pipeline.schedule_run()

    def views(self, cuda_stream: Any = None) -> tuple[Any, ...]:
        """The oldest batch fed and not yet taken: a DALI ``TensorList`` uint8 [B, size, size, 3] for each view.

        They are bound to ``cuda_stream`` where one is given, and are valid until ``release``.

        Raises:
            RuntimeError: an image of the batch could not be decoded.
        """
        return tuple(self._pipeline.share_outputs(cuda_stream))

    def release(self) -> None:
        """Give the buffers of the views taken last back to DALI."""
        self._pipeline.release_outputs()


def _inputs(views: ViewParameters) -> dict[str, npt.NDArray[Any]]:
    """The graph's inputs, one array [B, V, ...] each."""
    flipped = views.mirror.astype(bool)
    roi_start, roi_end = views.roi_start.copy(), views.roi_end.copy()
    roi_start[flipped, 1], roi_end[flipped, 1] = views.roi_end[flipped, 1], views.roi_start[flipped, 1]
    radius = np.clip(np.ceil(3 * views.sigma), 1, MAX_BLUR_RADIUS)
    return {
        "roi_start": roi_start,
        "roi_end": roi_end,
        "color": views.color,
        "twisted": (views.color != np.array([1, 1, 1, 0], np.float32)).any(-1),
        "sigma": views.sigma,
        "window": (2 * radius + 1).astype(np.int32),
        "solarize": views.solarize,
    }


@pipeline_def(enable_conditionals=True)
def _graph(crops: CropsConfig, device: Device) -> tuple[Any, ...]:
    payload = fn.external_source(name="payload", dtype=types.UINT8, ndim=1)
    given = {name: fn.external_source(name=name, dtype=dtype, ndim=ndim) for name, dtype, ndim in _INPUTS}
    image = fn.decoders.image(payload, device="mixed" if device == "gpu" else "cpu", output_type=types.RGB)
    can_solarize = [
        crops.solarize.global_probability[min(view, len(crops.solarize.global_probability) - 1)] > 0
        for view in range(crops.global_count)
    ]
    views = []
    for view in range(crops.global_count + crops.local_count):
        is_global = view < crops.global_count
        size = crops.global_size if is_global else crops.local_size
        output = _view(image, size, {name: given[name][view] for name, _, _ in _INPUTS})
        if is_global and can_solarize[view]:
            output = _solarized(output, given["solarize"][view])
        views.append(output)
    return tuple(views)


def _view(image: Any, size: int, given: dict[str, Any]) -> Any:
    """One view of every image; only samples that need an operator pass through it."""
    view = fn.resize(
        image,
        size=[size, size],
        roi_start=given["roi_start"],
        roi_end=given["roi_end"],
        roi_relative=True,
        interp_type=types.INTERP_CUBIC,
        antialias=True,
    )
    color = given["color"]
    if given["twisted"]:
        view = fn.color_twist(view, brightness=color[0], contrast=color[1], saturation=color[2], hue=color[3])
    if given["sigma"] > 0:
        view = fn.gaussian_blur(view, sigma=given["sigma"], window_size=given["window"])
    return view


def _solarized(view: Any, threshold: Any) -> Any:
    if threshold < NO_SOLARIZE:
        # 255 - x is every bit of x inverted
        view = view ^ fn.cast(255 * fn.cast(view >= threshold, dtype=types.UINT8), dtype=types.UINT8)
    return view


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
