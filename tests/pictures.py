"""Pictures for tests: made here, nothing is downloaded."""

from __future__ import annotations

import io
import os
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from edgevlm._arrays import check_image
from edgevlm.errors import FileError, ImageError
from edgevlm.image import load_image

Array = NDArray[Any]

#: One in so many of the kernels' random cases is tried: emulated computers are slow (docs/raspberry-pi.md).
THIN = int(os.environ.get("EDGEVLM_THIN", "1"))
#: Shapes that models cut in different ways: (height, width).
SIZES = {"landscape": (40, 70), "portrait": (90, 31), "square": (64, 64), "strip": (3, 200), "pixel": (1, 1),
         "large": (700, 520), "wide": (80, 230)}  # fmt: skip


def picture(size: str, seed: int = 0) -> Array:
    """Noise over a gradient, uint8 [H, W, 3], of one of `SIZES`."""
    height, width = SIZES[size]
    ramp = np.linspace(0, 160, height * width * 3).reshape(height, width, 3)
    return (ramp + np.random.default_rng(seed).integers(0, 95, ramp.shape)).astype(np.uint8)


def noise(height: int = 24, width: int = 36, channels: int = 3) -> Array:
    return np.random.default_rng(3).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(height: int = 96, width: int = 144) -> Array:
    """A picture that JPEG does not ruin: gradients, different in each corner."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [255 * x / width, 255 * y / height, 255 * (x + y) / (width + height)]
    return np.stack(planes, axis=2).astype(np.uint8)


def encoded(image: Image.Image | Array, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, form, **options)
    return file.getvalue()


def on_white(colour: Array, alpha: Array) -> Array:
    """Straight alpha over white, rounded: the documented rule in integers. Halves cannot occur, 255 is odd."""
    numerator = colour.astype(np.int64) * alpha + 255 * (255 - alpha.astype(np.int64))
    return ((2 * numerator + 255) // 510).astype(np.uint8)


def assert_image(found: Array, expected: Array) -> None:
    """uint8 RGB in a form that the kernels take without a copy, equal; and one damaged bit is seen."""
    assert found.dtype == np.uint8
    assert check_image(found, spaced=True) is found
    assert found.shape == expected.shape
    assert np.array_equal(found, expected)
    damaged = expected.copy()
    damaged.flat[0] ^= 1
    assert not np.array_equal(found, damaged)


def code_of(source: Any, **options: Any) -> str:
    with pytest.raises((ImageError, FileError)) as caught:
        load_image(source, **options)
    return caught.value.code


def exif(orientation: Any) -> bytes:
    directory = Image.Exif()
    directory[0x0112] = orientation
    return directory.tobytes()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """One chunk of a PNG file."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of_zeros(height: int, width: int) -> bytes:
    """A valid one-bit PNG, deflated as it is made; 20000 x 20000 take 50 kB."""

    deflate = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    body = b"".join(deflate.compress(row) for _ in range(height)) + deflate.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")
