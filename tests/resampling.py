"""What the tests of the resize share: pictures, Pillow's answer, and a comparison that can fail."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]

FILTERS = {name: Image.Resampling[name.upper()] for name in ("box", "bilinear", "hamming", "bicubic", "lanczos")}

# Sides in three ranges, so that small ones, where borders rule, come up often.
side = st.integers(1, 4) | st.integers(1, 40) | st.integers(41, 300)
image = st.tuples(side, side, st.sampled_from([1, 3, 4]), st.integers(0, 1000))


def random_image(height: int, width: int, channels: int, seed: int = 0) -> Array:
    """Noise in one half of the cases, full-swing black and white in the other: it makes filters overshoot."""
    rng = np.random.default_rng(seed)
    image_HWC = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return image_HWC if seed % 2 == 0 else np.where(image_HWC > 127, 255, 0).astype(np.uint8)


def pillow_resize(image_HWC: Array, height: int, width: int, resample: str, box: Any = None) -> Array:
    """Pillow's answer; four channels as "RGBX", which is not multiplied by an alpha."""
    rows, columns, channels = image_HWC.shape
    mode = {1: "L", 3: "RGB", 4: "RGBX"}[channels]
    image = Image.frombytes(mode, (columns, rows), np.ascontiguousarray(image_HWC).tobytes())
    resized = image.resize((width, height), FILTERS[resample], box)
    return np.frombuffer(resized.tobytes(), np.uint8).reshape(height, width, channels)


def damaged(array: Array) -> Array:
    """A copy with its last sample off by one unit."""
    copy = array.copy()
    copy.flat[-1] ^= 1
    return copy


def assert_equal(found: Array, expected: Array) -> None:
    """Equality in shape, type and every bit; and the comparison itself sees a single damaged bit."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()
    if found.dtype == np.uint8:
        assert found.tobytes() != damaged(expected).tobytes()
