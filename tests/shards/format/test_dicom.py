"""Values of DICOM images by their meaning, their stored form, and files that are refused."""

from __future__ import annotations

import io
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pydicom")
import imagecodecs
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import pixel_array

from shards.errors import ShardError
from shards.format.decode import decode
from shards.format.images import read_size
from shards.format.pixels import PixelFormat
from shards.packing.pack import PackOptions, pack
from shards.packing.tiles import Tiling
from shards.packing.verify import verify

GREY8, GREY16, FLOAT = PixelFormat(1, "uint8"), PixelFormat(1, "uint16"), PixelFormat(1, "float32")
CODECS = {
    ".4.50": lambda values: imagecodecs.jpeg_encode(values, level=100),
    ".4.70": imagecodecs.ljpeg_encode,
    ".4.80": imagecodecs.jpegls_encode,
    ".4.90": lambda values: imagecodecs.jpeg2k_encode(values, level=0, reversible=True, codecformat="j2k"),
    ".5": lambda values: rle(values),
}


def image(stored: int = 12, signed: bool = False) -> np.ndarray:
    """Return [24, 20] over the whole range of ``stored`` bits."""
    values = np.linspace(0, (1 << stored) - 1, 480).astype(np.int64).reshape(24, 20)
    bits = 8 if stored <= 8 else 16
    return (values - (1 << (stored - 1)) * signed).astype(f"{'' if signed else 'u'}int{bits}")


def rle(values: np.ndarray) -> bytes:
    """Return a frame of one literal run after another, a segment a byte, the most significant one first."""
    planes = values.astype(values.dtype.newbyteorder(">")).view(np.uint8).reshape(values.size, -1).T
    segments = []
    for plane in planes:
        parts = [plane[at : at + 128].tobytes() for at in range(0, plane.size, 128)]
        encoded = b"".join(bytes([len(part) - 1]) + part for part in parts)
        segments.append(encoded + b"\x80" * (len(encoded) % 2))
    starts = np.cumsum([64, *map(len, segments)])[: len(segments)]
    return np.array([len(segments), *starts, *[0] * (15 - len(segments))], "<u4").tobytes() + b"".join(segments)


def dicom(values: np.ndarray, syntax: str = ".1", stored: int | None = None, **attributes: Any) -> bytes:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = f"1.2.840.10008.1.2{syntax}"
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = "1.2.3"
    dataset.PatientName = "Secret^Name"
    bits = 8 * values.dtype.itemsize
    dataset.Rows, dataset.Columns = values.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored = bits, stored or bits
    dataset.HighBit, dataset.PixelRepresentation = (stored or bits) - 1, int(values.dtype.kind == "i")
    dataset.PixelData = encapsulate([bytes(CODECS[syntax](values))]) if syntax in CODECS else values.tobytes()
    dataset["PixelData"].VR = "OB" if syntax in CODECS else "OW"
    for name, value in attributes.items():
        setattr(dataset, name, value)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@pytest.mark.parametrize("syntax", ["", ".1", *CODECS])
def test_stored_values_of_every_compression(syntax: str) -> None:
    for pixels, values in ((GREY8, image(8)), (GREY16, image(12)), (GREY16, image(16))):
        if syntax == ".4.50" and pixels == GREY16:
            continue
        payload = dicom(values, syntax)
        assert read_size(payload, pixels) == (20, 24)
        found = decode(payload, pixels=pixels)[..., 0]
        assert found.dtype == values.dtype and np.abs(found.astype(int) - values).max() <= 2 * (syntax == ".4.50")
        if syntax in ("", ".1", ".5"):
            assert np.array_equal(found, pixel_array(io.BytesIO(payload)))


def test_slope_intercept_sign_and_inversion() -> None:
    signed = image(12, signed=True)
    rescaled = dicom(signed, stored=12, RescaleSlope="2.5", RescaleIntercept="-1024")
    assert np.array_equal(decode(rescaled, pixels=FLOAT)[..., 0], (signed * 2.5 - 1024).astype(np.float32))
    # the bits above the stored ones are not part of the value
    with_overlay = dicom(signed & 0x0FFF, stored=12, RescaleSlope="1", RescaleIntercept="0")
    assert np.array_equal(decode(with_overlay, pixels=FLOAT)[..., 0], signed.astype(np.float32))
    for values, inverted in ((image(12), 4095 - image(12).astype(int)), (signed, -1 - signed.astype(int))):
        payload = dicom(values, stored=12, PhotometricInterpretation="MONOCHROME1")
        assert np.array_equal(decode(payload, pixels=FLOAT)[..., 0], inverted)
    inverted16 = dicom(image(12), stored=12, PhotometricInterpretation="MONOCHROME1", RescaleSlope=1)
    assert np.array_equal(decode(inverted16, pixels=GREY16)[..., 0], 4095 - image(12))
    assert np.array_equal(decode(dicom(signed, ".4.90", stored=12), pixels=FLOAT)[..., 0], signed)
    for syntax in (".4.70", ".4.80", ".5"):
        compressed = bytearray(dicom(signed.view(np.uint16) & 0x0FFF, syntax, stored=12, PixelRepresentation=1))
        assert np.array_equal(decode(bytes(compressed), pixels=FLOAT)[..., 0], signed), syntax


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (dicom(image(), RescaleSlope="2"), "it has a slope of 2 and an intercept of 0; pack as float32"),
        (dicom(image(12, signed=True)), "it has values of int16, not uint16"),
        (dicom(image(8)), "it has values of uint8, not uint16"),
        (dicom(image(), NumberOfFrames=3), "a DICOM file of 3 frames; only single frames are supported"),
        (dicom(image(), PhotometricInterpretation="PALETTE COLOR"), "of kind PALETTE COLOR; only monochrome"),
        (dicom(image(), SharedFunctionalGroupsSequence=[Dataset()]), "an enhanced multi-frame DICOM object"),
        (dicom(image(), ModalityLUTSequence=[Dataset()]), "a modality lookup table"),
        (dicom(image(), HighBit=15, BitsStored=12), "12 bits in 16 is not supported"),
        (dicom(image(), Rows=25), "it is truncated: 960 bytes of pixels, its header promises 1000"),
        (dicom(image(), Rows=0), "it has 20x0 pixels"),
        (dicom(image(), Rows=60_000, Columns=60_000), "60000x60000"),
        (dicom(image(), ".4.80", Rows=2000), "its header has 20x2000 pixels, the image in it 20x24"),
        (dicom(image(), ".4.90", Rows=2000), "its header has 20x2000 pixels, the image in it 20x24"),
        (dicom(image(), ".5", Rows=25), "is truncated"),
        (dicom(image(), PixelData=b""), "a DICOM file without integer pixels"),
        (dicom(image()).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.2\0"), "1.2.840.10008.1.2.2 is not supp"),
        (b"\0" * 128 + b"DICM" + zlib.compress(bytes(1000)), "transfer syntax unknown is not supported"),
    ],
)
def test_other_files_are_refused_with_a_reason(payload: bytes, reason: str) -> None:
    with pytest.raises(ShardError, match=re.escape(reason)):
        decode(payload, pixels=GREY16)


def test_packed_sets_hold_values_only(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for number in range(3):
        payload = dicom(image(12, signed=True), stored=12, RescaleSlope=number + 1, RescaleIntercept=-1000)
        (tmp_path / "src" / f"{number}.dcm").write_bytes(payload)
    (tmp_path / "src" / "cine.dcm").write_bytes(dicom(image(), NumberOfFrames=2))
    report = pack(tmp_path / "src", tmp_path / "set", PackOptions(pixels=FLOAT))
    assert (report.manifest.num_samples, report.num_rejected) == (3, 1) and verify(tmp_path / "set") == []
    assert b"Secret" not in (tmp_path / "set" / "shards" / "000000.tar").read_bytes()
    tiled = pack(tmp_path / "src", tmp_path / "tiles", PackOptions(pixels=FLOAT, tiles=Tiling(16)))
    assert (tiled.manifest.num_samples, tiled.num_rejected) == (12, 1)
    with pytest.raises(ShardError, match="DICOM files are images only with --channels 1 and --dtype"):
        pack(tmp_path / "src", tmp_path / "rgb")


def test_a_missing_library_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "x.dcm").write_bytes(dicom(image()))
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "pydicom" else real(name))
    with pytest.raises(ShardError, match=re.escape("pip install 'streamtrain[dicom]'")):
        pack(tmp_path / "src", tmp_path / "set", PackOptions(pixels=GREY16))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_damaged_files_give_an_image_or_one_line(data: st.DataObject) -> None:
    damaged = bytearray(dicom(image(), data.draw(st.sampled_from([".1", ".4.70", ".4.80", ".4.90", ".5"]))))
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(128, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    payload = bytes(damaged[: data.draw(st.integers(128, len(damaged)))])
    try:
        assert decode(payload, pixels=FLOAT, max_pixels=1 << 16).dtype == np.float32
    except ShardError as error:
        assert "\n" not in str(error)
