"""Storage of AdamW's two moments: on the device (fp32 or 8-bit), in host memory, or in files.

The update always runs on the device with the same arithmetic: a store loads a chunk of fp32 moments and stores it
afterwards, once per optimiser step. Offloading costs little where it is needed, because with few devices an optimiser
step has many micro-batches.
"""

from __future__ import annotations

import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from streamtrain.config.engine import EngineConfig
from streamtrain.errors import ConfigError
from streamtrain.ops.host_memory import staged_chunks

KEYS = ("exp_avg", "exp_avg_sq")
# values of a file loaded at a time, and of host memory, where several chunks are under way
CHUNK, HOST_CHUNK = 16 * 2**20, 8 * 2**20
# smaller, because the nearest-code search needs several 64-bit temporaries per value
EIGHT_BIT_CHUNK = 4 * 2**20
# values that share one scale
BLOCK = 256


class Moments(ABC):
    """Both moments of one flat parameter of ``numel`` values, initially zero."""

    # values loaded at a time
    chunk: int = CHUNK

    def __init__(self, numel: int, device: torch.device) -> None:
        self.numel, self.device = numel, device

    def staged(self) -> Iterator[tuple[slice, list[Tensor]]]:
        """Iterate over chunks as fp32 tensors on the device; the caller's in-place changes are stored."""
        for start in range(0, self.numel, self.chunk):
            stop = min(start + self.chunk, self.numel)
            values = [self.load(key, start, stop) for key in KEYS]
            yield slice(start, stop), values
            for key, value in zip(KEYS, values, strict=True):
                self.store(key, start, value)

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Return fp32 ``[stop - start]`` for a checkpoint."""
        # load() and store() need multiples of BLOCK
        first = start // BLOCK * BLOCK
        return self.load(key, first, stop)[start - first :]

    def write(self, key: str, start: int, values: Tensor) -> None:
        """Set the values that begin at ``start``."""
        first = start // BLOCK * BLOCK
        last = min(-(-(start + len(values)) // BLOCK) * BLOCK, self.numel)
        whole = self.load(key, first, last)
        whole[start - first : start - first + len(values)] = values.to(whole.device)
        self.store(key, first, whole)

    @abstractmethod
    def load(self, key: str, start: int, stop: int) -> Tensor:
        """Return fp32 ``[stop - start]`` on the device; ``start`` is a multiple of ``BLOCK``."""

    @abstractmethod
    def store(self, key: str, start: int, values: Tensor) -> None:
        """Store ``values`` at ``start``, a multiple of ``BLOCK``."""

    @abstractmethod
    def num_bytes(self) -> int:
        """Return the size of both moments, in memory or on disk."""


class TensorMoments(Moments):
    """fp32 tensors on the device, or in (pinned) host memory."""

    def __init__(self, numel: int, device: torch.device, home: torch.device) -> None:
        super().__init__(numel, device)
        pinned = device.type == "cuda" and home.type == "cpu"
        self.tensors = {key: torch.zeros(numel, device=home, pin_memory=pinned) for key in KEYS}

    def staged(self) -> Iterator[tuple[slice, list[Tensor]]]:
        home = [self.tensors[key] for key in KEYS]
        yield from staged_chunks(home, self.device, self.numel if home[0].device == self.device else HOST_CHUNK)

    def load(self, key: str, start: int, stop: int) -> Tensor:
        return self.tensors[key][start:stop].to(self.device, non_blocking=True)

    def store(self, key: str, start: int, values: Tensor) -> None:
        home = self.tensors[key][start : start + len(values)]
        if home.data_ptr() != values.data_ptr():
            home.copy_(values, non_blocking=True)

    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class EightBitMoments(Moments):
    """8-bit codes and one fp32 scale per block, on the device (Dettmers et al. 2022), with torchao's code maps.

    The tensors are padded to whole blocks, so that tensors of any size are quantised.
    """

    chunk = EIGHT_BIT_CHUNK

    def __init__(self, numel: int, device: torch.device) -> None:
        super().__init__(numel, device)
        maps = eight_bit_maps()
        self.maps = dict(zip(KEYS, (each.to(device) for each in maps), strict=True))
        blocks = -(-numel // BLOCK)
        # the code of 0, which differs between the maps
        zeros = {key: int((table == 0).nonzero()) for key, table in self.maps.items()}
        self.codes = {key: torch.full((blocks * BLOCK,), zeros[key], dtype=torch.uint8, device=device) for key in KEYS}
        self.scales = {key: torch.zeros(blocks, device=device) for key in KEYS}

    def load(self, key: str, start: int, stop: int) -> Tensor:
        from torchao.optim.quant_utils import dequant_with_qmap

        blocks = slice(start // BLOCK, -(-stop // BLOCK))
        codes = self.codes[key].view(-1, BLOCK)[blocks].flatten()
        return dequant_with_qmap(codes, self.maps[key], self.scales[key][blocks])[: stop - start]

    def store(self, key: str, start: int, values: Tensor) -> None:
        from torchao.optim.quant_utils import quantize_8bit_with_qmap

        table = self.maps[key]
        padded = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
        # The signed map reaches 1 but not -1. Scale so that the extreme of either sign gets the last code of that sign:
        # then loading and storing again, as with a checkpoint, changes nothing.
        scale = torch.maximum(padded.amax(1) / table[-1], padded.amin(1) / table[0].clamp_max(-1e-3)).clamp_min(1e-30)
        blocks = slice(start // BLOCK, start // BLOCK + len(scale))
        self.codes[key].view(-1, BLOCK)[blocks] = quantize_8bit_with_qmap(padded / scale[:, None], table)
        self.scales[key][blocks] = scale

    def num_bytes(self) -> int:
        return sum(self.codes[key].nbytes + self.scales[key].nbytes for key in KEYS)


class FileMoments(Moments):
    """One fp32 file per moment, read and written in chunks; only one chunk is in memory."""

    def __init__(self, numel: int, device: torch.device, path: Path) -> None:
        super().__init__(numel, device)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.files = {}
        for key in KEYS:
            # truncate an earlier run's file; unwritten parts of the new one read as zeros
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
            self.files[key] = os.open(path.with_name(f"{path.name}.{key}"), flags, 0o644)
            os.truncate(self.files[key], 4 * numel)

    def load(self, key: str, start: int, stop: int) -> Tensor:
        values = torch.empty(stop - start)
        memory = values.numpy().data.cast("B")
        done = 0
        while done < len(memory):
            done += os.preadv(self.files[key], [memory[done:]], 4 * start + done)
        return values.to(self.device)

    def store(self, key: str, start: int, values: Tensor) -> None:
        memory = values.cpu().numpy().data.cast("B")
        done = 0
        while done < len(memory):
            done += os.pwrite(self.files[key], memory[done:], 4 * start + done)

    def num_bytes(self) -> int:
        return sum(os.fstat(file).st_size for file in self.files.values())

    def __del__(self) -> None:
        for file in self.files.values():
            os.close(file)


class SplitMoments(Moments):
    """The first values in one store, the rest in a second one."""

    def __init__(self, first: Moments, second: Moments) -> None:
        super().__init__(first.numel + second.numel, first.device)
        assert first.numel % BLOCK == 0
        self.first, self.second = first, second

    def staged(self) -> Iterator[tuple[slice, list[Tensor]]]:
        yield from self.first.staged()
        for part, values in self.second.staged():
            yield slice(part.start + self.first.numel, part.stop + self.first.numel), values

    def load(self, key: str, start: int, stop: int) -> Tensor:
        boundary = self.first.numel
        parts = [self.first.load(key, start, min(stop, boundary))] if start < boundary else []
        if stop > boundary:
            parts.append(self.second.load(key, max(start, boundary) - boundary, stop - boundary))
        return torch.cat(parts)

    def store(self, key: str, start: int, values: Tensor) -> None:
        count = max(0, min(self.first.numel - start, len(values)))
        if count:
            self.first.store(key, start, values[:count])
        if count < len(values):
            self.second.store(key, max(0, start - self.first.numel), values[count:])

    def num_bytes(self) -> int:
        return self.first.num_bytes() + self.second.num_bytes()


def eight_bit_maps() -> tuple[Tensor, Tensor]:
    """Return the values of the 256 codes, signed (first moment) and unsigned (second moment).

    Raises:
        ConfigError: if torchao is not installed.
    """
    try:
        from torchao.optim.quant_utils import create_dynamic_map
    except ImportError:
        raise ConfigError(
            "engine.moments=8bit needs the package torchao: pip install torchao, or choose device, host or disk"
        ) from None
    return torch.tensor(create_dynamic_map(True)), torch.tensor(create_dynamic_map(False))


def moments_maker(engine: EngineConfig, folder: Path, device: torch.device) -> Callable[[Tensor], Moments]:
    """Return a function that creates the moments of a flat parameter; ``folder`` is for this rank's files only.

    Raises:
        ConfigError: if ``engine.moments`` needs a package that is not installed.
    """
    if engine.moments == "8bit":
        eight_bit_maps()
    count = itertools.count()

    def configured(numel: int) -> Moments:
        if engine.moments == "8bit":
            return EightBitMoments(numel, device)
        if engine.moments == "disk":
            return FileMoments(numel, device, folder / f"{next(count):05d}")
        return TensorMoments(numel, device, torch.device("cpu") if engine.moments == "host" else device)

    def make(parameter: Tensor) -> Moments:
        kept = int((1.0 - engine.moments_ratio) * parameter.numel()) // BLOCK * BLOCK
        if not kept:
            return configured(parameter.numel())
        return SplitMoments(TensorMoments(kept, device, device), configured(parameter.numel() - kept))

    return make
