"""The work of the loader's thread: read samples, decode, run DALI, assemble batches, replace undecodable images."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shards.errors import ShardError
from shards.format.decode import Array, decode, read_bounded
from shards.reading.random_window import Box
from shards.reading.source import Samples, Source
from streamtrain.config.crops import CropSizes
from streamtrain.config.masks import max_rows
from streamtrain.config.tree import Config
from streamtrain.data.augment import SizeSchedule, ViewParameters, draw_views
from streamtrain.data.augmentations import UserAugmentation
from streamtrain.data.batch import Batch, Masks
from streamtrain.data.masking import MaskParameters, draw_masks, rasterise, select_every_patch
from streamtrain.data.pipeline import CropPipeline
from streamtrain.data.views import CpuViewMaker, CropError, recolor_views, transpose_views


@dataclass
class PendingBatch:
    """A batch whose kernels may still be running on the loader's CUDA stream."""

    batch: Batch
    event: torch.cuda.Event | None

    def wait(self) -> Batch:
        """Return the batch, ordered before later work on the caller's current stream."""
        if self.event is not None:
            stream = torch.cuda.current_stream(self.batch.global_crops.device)
            stream.wait_event(self.event)
            for tensor in self.batch.tensors():
                tensor.record_stream(stream)
        return self.batch


@dataclass(frozen=True)
class _QueuedBatch:
    """A batch in DALI's queue, kept to feed it again after a failure and to name its samples."""

    samples: Samples
    decoded: dict[int, Array]  # by row: images that DALI would decode to other pixels, or not at all
    views: ViewParameters
    masks: MaskParameters
    sizes: CropSizes

    def feed_to(self, pipeline: CropPipeline) -> None:
        pipeline.feed(self.samples.payloads, self.views, self.sizes, self.decoded)


class Producer:
    """Produces the batches of a rank; used by one thread only."""

    def __init__(
        self,
        source: Source,
        slots: Iterator[npt.NDArray[np.int64]],
        config: Config,
        device: torch.device,
        size_schedule: SizeSchedule,
        start_slot: int,
        threads: int,
        augmentation: UserAugmentation | None = None,
    ) -> None:
        self._source, self._slots, self._augmentation = source, slots, augmentation
        self._config, self._device, self._threads = config, device, threads
        self._size_schedule = size_schedule
        # every micro-batch starts at start_slot plus a multiple of its own size
        self._alignment = int(np.gcd(start_slot, config.data.micro_batch))
        # (shard, sample) of images that DALI has failed to decode
        self._failed_in_dali: set[tuple[int, int]] = set()
        self._background, self._pixels = config.data.background_color, config.data.pixels
        self._decoders = ThreadPoolExecutor(threads, "decoder")

    def batches(self) -> Generator[PendingBatch, None, None]:
        """Yield the batches in slot order."""
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            # a new thread starts on GPU 0, and would make a context of about 0.5 GB there
            torch.cuda.set_device(self._device)
        stream = torch.cuda.Stream(self._device) if on_gpu else None
        view_maker = None if on_gpu else CpuViewMaker(self._config.crops, self._threads, self._pixels)
        reader = self._source.batches(self._slots)
        pipeline = self._build_pipeline()
        queue: deque[_QueuedBatch] = deque()
        try:
            while True:
                while len(queue) < self._config.data.prefetch:
                    queue.append(self._draw_parameters(next(reader)))
                    queue[-1].feed_to(pipeline)
                try:
                    decoded = pipeline.take(stream)
                except RuntimeError as error:
                    # the pipeline is unusable now; rebuild it and feed it the same batches and parameters
                    queue[0] = self._replace_undecodable(queue[0], error)
                    pipeline = self._rebuild_pipeline(queue)
                    continue
                try:
                    pending = self._assemble(queue[0], decoded, stream, view_maker)
                except CropError as error:
                    replaced = self._source.replace(queue[0].samples, error.row, str(error))
                    queue[0] = self._draw_parameters(replaced)
                    del decoded
                    pipeline = self._rebuild_pipeline(queue)
                    continue
                queue.popleft()
                del decoded
                pipeline.release()
                yield pending
        finally:
            if view_maker is not None:
                view_maker.close()
            self._decoders.shutdown(cancel_futures=True)
            self._source.close()

    def _build_pipeline(self, of_one_image: bool = False) -> CropPipeline:
        """``of_one_image``: only decode, an image at a time."""
        on_gpu = self._device.type == "cuda"
        return CropPipeline(
            self._config.crops,
            1 if of_one_image else self._config.data.micro_batch,
            self._config.crop_sizes,
            device="gpu" if on_gpu else "cpu",
            device_id=(self._device.index or 0) if on_gpu else None,
            threads=self._threads,
            prefetch=1 if of_one_image else self._config.data.prefetch,
            cropping=on_gpu and not of_one_image,
            pixels=self._pixels,
        )

    def _rebuild_pipeline(self, queue: Iterable[_QueuedBatch]) -> CropPipeline:
        """Return a new pipeline with the same batches and parameters in its queue."""
        pipeline = self._build_pipeline()
        for item in queue:
            item.feed_to(pipeline)
        return pipeline

    def _draw_parameters(self, samples: Samples) -> _QueuedBatch:
        seed, crops = self._config.run.seed, self._config.crops
        sizes = self._size_schedule.sizes_at(int(samples.slots[0]))
        grid = sizes.global_size.grid(self._config.model.patch_size)
        samples, image_sizes, decoded = self._decode_on_host(samples)
        windows = self._draw_windows(samples, image_sizes)
        view_sizes = image_sizes.copy()
        for row, (top, left, bottom, right) in windows.items():
            view_sizes[row] = right - left, bottom - top
        views = draw_views(crops, seed, samples.slots, view_sizes, self._pixels.channels, sizes)
        for row, (top, left, _, _) in windows.items():
            views.shift(row, (top, left), view_sizes[row], image_sizes[row])
        return _QueuedBatch(
            samples,
            decoded,
            views,
            draw_masks(self._config.masks, seed, samples.slots, crops.global_count, grid),
            sizes,
        )

    def _draw_windows(self, samples: Samples, sizes: npt.NDArray[np.int32]) -> dict[int, Box]:
        """Return the windows of the images that are decoded whole although they are larger, by row.

        Their views come from these parts of the image, so that DALI can still decode it.
        """
        window = self._source.window
        if window is None:
            return {}
        sized = zip(samples.slots.tolist(), sizes.tolist(), strict=True)
        return {row: window.draw(slot, *size) for row, (slot, size) in enumerate(sized) if window.applies_to(*size)}

    def _decode_on_host(self, samples: Samples) -> tuple[Samples, npt.NDArray[np.int32], dict[int, Array]]:
        """Decode images that DALI would decode to other pixels, and replace undecodable ones.

        Returns:
            the samples with substitutes, the sizes int32 [B, 2] (width, height) of their images, or of the windows that
            the source has decoded, and the decoded images [height, width, channels] by row.
        """
        sizes = np.empty((len(samples.slots), 2), np.int32)
        decoded: dict[int, Array] = {}
        rows = list(range(len(samples.slots)))
        while rows:
            failed = {}
            decoding = {}
            for row in rows:
                if row in samples.windows:
                    decoded[row] = samples.windows[row]
                    sizes[row] = decoded[row].shape[1::-1]
                    continue
                payload = _as_bytes(samples.payloads[row])
                try:
                    header = read_bounded(payload, self._config.data.max_pixels, self._pixels)
                except ShardError as error:
                    failed[row] = str(error)
                    continue
                sizes[row] = header.width, header.height
                position = int(samples.shards[row]), int(samples.samples[row])
                if header.needs_host or not self._pixels.is_rgb or position in self._failed_in_dali:
                    decoding[row] = self._decoders.submit(self._decode, payload)
            for row, future in decoding.items():
                try:
                    decoded[row] = future.result()
                except ShardError as error:
                    failed[row] = str(error)
            for row, reason in failed.items():
                samples = self._source.replace(samples, row, reason)
            # a substitute may be undecodable too
            rows = list(failed)
        return samples, sizes, decoded

    def _decode(self, payload: bytes) -> Array:
        max_pixels = self._config.data.max_pixels
        return decode(payload, background=self._background, max_pixels=max_pixels, pixels=self._pixels)

    def _assemble(
        self, item: _QueuedBatch, decoded: list[Any], stream: torch.cuda.Stream | None, view_maker: CpuViewMaker | None
    ) -> PendingBatch:
        """Build views and masks on the device, copied out of the DALI buffers in ``decoded``."""
        crops_config = self._config.crops
        count, local_size = crops_config.global_count, item.sizes.local_size
        if view_maker is not None:
            masks_future = view_maker.submit(self._rasterise_masks, item)
            images = [
                torch.from_numpy(item.decoded[row]) if row in item.decoded else torch.from_dlpack(image)
                for row, image in enumerate(decoded[0])
            ]
            slots, own, augment = item.samples.slots.tolist(), self._augmentation, None
            if own is not None:
                augment = lambda crops, row, is_local: own(crops, slots[row], is_local)  # noqa: E731
            global_crops, local_crops, gram_crops = view_maker.make_views(images, item.views, item.sizes, augment)
            masks = masks_future.result()
            return PendingBatch(Batch(item.samples.slots, global_crops, local_crops, masks, gram_crops), None)

        assert stream is not None
        with torch.cuda.stream(stream):
            crops = [torch.from_dlpack(view.as_tensor()) for view in decoded]
            global_crops = recolor_views(crops_config, crops[:count], item.views, 0, self._pixels)
            empty = global_crops.new_empty(0, *local_size, self._pixels.channels)
            local_views = crops[count : count + crops_config.local_count]
            local_crops = empty
            if local_views:
                local_crops = recolor_views(crops_config, local_views, item.views, count, self._pixels)
            gram_crops = torch.cat(crops[-count:]) if item.sizes.gram_size else None
            if gram_crops is not None:
                transpose_views(gram_crops, item.views, 0, count, (1, 2))
            if self._augmentation is not None:
                for views, is_local in ((global_crops, False), (local_crops, True)):
                    self._augmentation.augment_batch(views, item.samples.slots.tolist(), is_local)
            masks = self._rasterise_masks(item)
            event = torch.cuda.Event()
            event.record(stream)
        return PendingBatch(Batch(item.samples.slots, global_crops, local_crops, masks, gram_crops), event)

    def _rasterise_masks(self, item: _QueuedBatch) -> Masks:
        config, grid = self._config, item.sizes.global_size.grid(self._config.model.patch_size)
        batch, views = config.data.micro_batch, config.crops.global_count
        if config.teacher.kind == "frozen":
            return select_every_patch(batch * views, grid[0] * grid[1], self._device)
        num_rows = max_rows(config.masks, batch, views, grid[0] * grid[1], self._alignment)
        return rasterise(item.masks, grid, num_rows, self._device)

    def _replace_undecodable(self, item: _QueuedBatch, error: RuntimeError) -> _QueuedBatch:
        """Return the failed batch; the host decodes the images that DALI cannot decode, or they are replaced.

        So every image that packing and verification accept is used, whichever decoder fails.

        Raises:
            RuntimeError: ``error`` again, if every image decodes on its own.
        """
        samples = item.samples
        positions = list(zip(samples.shards.tolist(), samples.samples.tolist(), strict=True))
        failed = {positions[row] for row in range(len(positions)) if self._fails_alone(item, row)}
        if not failed:
            raise error
        self._failed_in_dali |= failed
        return self._draw_parameters(samples)

    def _fails_alone(self, item: _QueuedBatch, row: int) -> bool:
        """Return whether DALI, with the decoder of this device, fails on one image of a batch; slow."""
        payload = item.samples.payloads[row]
        if row in item.decoded or not len(payload):
            return row not in item.decoded
        pipeline = self._build_pipeline(of_one_image=True)
        pipeline.feed([payload], item.views, item.sizes)
        try:
            pipeline.take()
        except RuntimeError:
            # DALI's exception names no cause; the decoder prints its own message to stderr
            return True
        return False


def _as_bytes(payload: npt.NDArray[np.uint8]) -> bytes:
    """Return the bytes that an array of all of them was made of, without a copy."""
    base: object = payload.base
    return base if isinstance(base, bytes) and len(base) == len(payload) else payload.tobytes()
