"""What the loader's thread does: samples → DALI → finished batches, and what to do when an image does not decode."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shards.reading.source import Samples, Source
from streamtrain.config.crops import CropSizes
from streamtrain.config.masks import max_rows
from streamtrain.config.tree import Config
from streamtrain.data.augment import ViewParameters, draw_views
from streamtrain.data.batch import Batch, Masks
from streamtrain.data.masking import MaskParameters, draw_masks, every_patch, rasterise
from streamtrain.data.pipeline import CropPipeline, undecodable
from streamtrain.data.sizes import SizeChoice
from streamtrain.data.views import CpuViews, finish


@dataclass
class Finished:
    """A batch that may still be under way on the loader's CUDA stream."""

    batch: Batch
    event: torch.cuda.Event | None

    def claim(self) -> Batch:
        """The batch, safe to use on the caller's current stream."""
        if self.event is not None:
            stream = torch.cuda.current_stream(self.batch.global_crops.device)
            stream.wait_event(self.event)
            for tensor in self.batch.tensors():
                tensor.record_stream(stream)
        return self.batch


@dataclass(frozen=True)
class _InFlight:
    """A batch that DALI has been given: enough to feed it again, and to name its samples."""

    samples: Samples
    views: ViewParameters
    masks: MaskParameters
    sizes: CropSizes


class Producer:
    """Makes the batches; used by one thread only."""

    def __init__(
        self,
        source: Source,
        slots: Iterator[npt.NDArray[np.int64]],
        config: Config,
        device: torch.device,
        choice: SizeChoice,
        start_slot: int,
        threads: int,
    ) -> None:
        self._source, self._slots = source, slots
        self._config, self._device, self._threads = config, device, threads
        self._choice = choice
        # every micro-batch starts at start_slot plus a multiple of its own size
        self._alignment = int(np.gcd(start_slot, config.data.micro_batch))

    def batches(self) -> Generator[Finished, None, None]:
        """The finished batches, in the order of the slots."""
        on_gpu = self._device.type == "cuda"
        stream = torch.cuda.Stream(self._device) if on_gpu else None
        cpu_views = None if on_gpu else CpuViews(self._config.crops, self._threads)
        reader = self._source.batches(self._slots)
        pipeline = self._build()
        in_flight: deque[_InFlight] = deque()
        try:
            while True:
                while len(in_flight) < self._config.data.prefetch:
                    in_flight.append(self._prepare(next(reader)))
                    self._feed(pipeline, in_flight[-1])
                try:
                    decoded = pipeline.take(stream)
                except RuntimeError as error:
                    # the pipeline is dead; everything it was given is still here, with its parameters
                    in_flight[0] = self._mend(in_flight[0].samples, error)
                    pipeline = self._build()
                    for item in in_flight:
                        self._feed(pipeline, item)
                    continue
                finished = self._assemble(in_flight.popleft(), decoded, stream, cpu_views)
                del decoded
                pipeline.release()
                yield finished
        finally:
            if cpu_views is not None:
                cpu_views.close()
            self._source.close()

    def _build(self) -> CropPipeline:
        on_gpu = self._device.type == "cuda"
        return CropPipeline(
            self._config.crops,
            self._config.data.micro_batch,
            self._config.crop_sizes,
            device="gpu" if on_gpu else "cpu",
            device_id=(self._device.index or 0) if on_gpu else None,
            threads=self._threads,
            prefetch=self._config.data.prefetch,
            cropping=on_gpu,
        )

    @staticmethod
    def _feed(pipeline: CropPipeline, item: _InFlight) -> None:
        pipeline.feed(item.samples.payloads, item.views, item.sizes)

    def _grid(self, sizes: CropSizes) -> tuple[int, int]:
        """Patches of a global crop (down, across)."""
        side = sizes.global_size // self._config.model.patch_size
        return side, side

    def _prepare(self, samples: Samples) -> _InFlight:
        """Draw everything random about the samples."""
        seed, crops = self._config.run.seed, self._config.crops
        sizes = self._choice.of(int(samples.slots[0]))
        return _InFlight(
            samples,
            draw_views(crops, seed, samples.slots, samples.sizes),
            draw_masks(self._config.masks, seed, samples.slots, crops.global_count, self._grid(sizes)),
            sizes,
        )

    def _assemble(
        self, item: _InFlight, decoded: list[Any], stream: torch.cuda.Stream | None, cpu_views: CpuViews | None
    ) -> Finished:
        """Views and masks on the device, in memory of our own; ``decoded`` is what DALI hands out."""
        config = self._config
        count, size = config.crops.global_count, item.sizes.local_size
        if cpu_views is not None:
            masks_to_come = cpu_views.submit(self._masks, item)
            images = [torch.from_dlpack(image) for image in decoded[0]]
            global_crops, local_crops, gram_crops = cpu_views.make(images, item.views, item.sizes)
            masks = masks_to_come.result()
            return Finished(Batch(item.samples.slots, global_crops, local_crops, masks, gram_crops), None)

        assert stream is not None
        with torch.cuda.stream(stream):
            crops = [torch.from_dlpack(view.as_tensor()) for view in decoded]
            global_crops = finish(crops[:count], item.views, 0)
            no_crops = global_crops.new_empty(0, size, size, 3)
            of_local = crops[count : count + config.crops.local_count]
            local_crops = finish(of_local, item.views, count) if of_local else no_crops
            gram_crops = torch.cat(crops[-count:]) if item.sizes.gram_size else None
            masks = self._masks(item)
            event = torch.cuda.Event()
            event.record(stream)
        return Finished(Batch(item.samples.slots, global_crops, local_crops, masks, gram_crops), event)

    def _masks(self, item: _InFlight) -> Masks:
        config, grid = self._config, self._grid(item.sizes)
        batch, views = config.data.micro_batch, config.crops.global_count
        if config.teacher.kind == "frozen":
            return every_patch(batch * views, grid[0] * grid[1], self._device)
        num_rows = max_rows(config.masks, batch, views, grid[0] * grid[1], self._alignment)
        return rasterise(item.masks, grid, num_rows, self._device)

    def _mend(self, samples: Samples, error: RuntimeError) -> _InFlight:
        """The batch on which DALI failed, with substitutes for the images that do not decode by themselves.

        Raises:
            RuntimeError: ``error`` again, if each of them does.
        """
        mended = samples
        for row in range(len(samples.slots)):
            # the substitute may be no better
            while (reason := undecodable(mended.payloads[row])) is not None:
                mended = self._source.replace(mended, row, reason)
        if mended is samples:
            raise error
        return self._prepare(mended)
