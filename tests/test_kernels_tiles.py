"""`resize_tiles` against the same steps one by one, on every target.

Each comparison has a twin that damages the data by one unit and must fail.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import THIN
from resampling import FILTERS, Array, assert_equal, damaged, image, pillow_resize, random_image, side

from edgevlm import _kernels, kernels
from edgevlm.errors import UsageError

TARGETS = kernels.targets()
RGB = random_image(4, 5, 3)


def reference_tiles(resized_HWC: Array, canvas: Any, tile: Any, canvas_colour: Any, lut_C256: Array | None) -> Array:
    """What `resize_tiles` does behind the resize, a step at a time in numpy."""
    rows, columns, channels = resized_HWC.shape
    height, width, top, left = canvas
    canvas_HWC = np.empty((height, width, channels), np.uint8)
    canvas_HWC[:] = canvas_colour
    canvas_HWC[top : top + rows, left : left + columns] = resized_HWC
    tiles = canvas_HWC.reshape(height // tile[0], tile[0], width // tile[1], tile[1], channels)
    tiles_TCHW = tiles.transpose(0, 2, 4, 1, 3).reshape(-1, channels, *tile)
    if lut_C256 is None:
        return np.ascontiguousarray(tiles_TCHW)
    return np.ascontiguousarray(lut_C256[np.arange(channels)[None, :, None, None], tiles_TCHW])


def bordered(image_HWC: Array, border: Any, border_colour: Any) -> Array:
    """The picture in its border, as a picture of its own."""
    top, left, height, width = border
    rows, columns, channels = image_HWC.shape
    whole_HWC = np.empty((height, width, channels), np.uint8)
    whole_HWC[:] = border_colour
    whole_HWC[top : top + rows, left : left + columns] = image_HWC
    return whole_HWC


@st.composite
def intervals(draw: st.DrawFn, size: int) -> tuple[int, int]:
    """Start and length of a part of `size`, often all of it."""
    if draw(st.booleans()):
        return 0, size
    start = draw(st.integers(0, size - 1))
    return start, draw(st.integers(1, size - start))


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=200 // THIN, deadline=None)
@given(image, side, side, st.sampled_from(sorted(FILTERS)), st.data())
def test_tiles_equal_the_steps_one_by_one(
    target: str, shape: Any, height: int, width: int, resample: str, data: st.DataObject
) -> None:
    image_HWC = random_image(*shape)
    rows, columns, channels = image_HWC.shape
    colours = st.tuples(*[st.integers(0, 255)] * channels)
    margins = st.sampled_from([0, 0, 1, 7, 50])
    top, left, bottom, right = (data.draw(margins) for _ in range(4))
    border = (top, left, top + rows + bottom, left + columns + right)
    (w_top, w_rows), (w_left, w_columns) = data.draw(intervals(height)), data.draw(intervals(width))
    tile = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    c_top, c_left = data.draw(margins), data.draw(margins)
    canvas = (-(-(c_top + w_rows) // tile[0]) * tile[0], -(-(c_left + w_columns) // tile[1]) * tile[1], c_top, c_left)
    border_colour, canvas_colour = data.draw(colours), data.draw(colours)
    lut_C256 = np.random.default_rng(1).normal(size=(channels, 256)).astype(np.float32)
    lut_C256 = lut_C256 if data.draw(st.booleans()) else None
    found = kernels.resize_tiles(
        image_HWC, height, width, resample, None, target, border=border, border_colour=border_colour,
        window=(w_top, w_left, w_rows, w_columns), canvas=canvas, canvas_colour=canvas_colour, tile=tile,
        lut_C256=lut_C256,
    )  # fmt: skip
    resized_HWC = pillow_resize(bordered(image_HWC, border, border_colour), height, width, resample)
    window_HWC = resized_HWC[w_top : w_top + w_rows, w_left : w_left + w_columns]
    assert_equal(found, reference_tiles(window_HWC, canvas, tile, canvas_colour, lut_C256))
    assert not np.array_equal(found, reference_tiles(damaged(window_HWC), canvas, tile, canvas_colour, lut_C256))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 64, 65])
def test_tiles_are_written_where_they_belong(target: str, width: int) -> None:
    """Neither before the first nor behind the last sample, in memory of the caller's."""
    image_HWC = random_image(3, width, 3)
    lut_C256 = np.random.default_rng(1).normal(size=(3, 256)).astype(np.float32)
    expected_CHW = np.stack([lut_C256[c][image_HWC[:, :, c]] for c in range(3)])
    guarded = np.full(9 * width + 32, 42, dtype=np.float32)
    out_TCHW = guarded[16:-16].reshape(1, 3, 3, width)
    found = kernels.resize_tiles(image_HWC, 3, width, target=target, lut_C256=lut_C256, out_TCHW=out_TCHW)
    assert found is out_TCHW
    assert_equal(out_TCHW[0], expected_CHW)
    assert (guarded[:16] == 42).all()
    assert (guarded[-16:] == 42).all()


# ---- refusals ----


def unaligned_zeros(*shape: int) -> Array:
    """float32, one byte off its alignment."""
    return np.zeros(4 * int(np.prod(shape)) + 1, np.uint8)[1:].view(np.float32).reshape(shape)


@pytest.mark.parametrize(
    "change",
    [
        {"lut_C256": np.zeros((3, 256))},
        {"lut_C256": np.zeros((3, 255), np.float32)},
        {"lut_C256": np.zeros((4, 256), np.float32)},
        {"out_TCHW": np.zeros((1, 3, 2, 2), np.float32)},
        {"out_TCHW": np.zeros((2, 3, 2, 2), np.uint8)},
        {"out_TCHW": np.zeros((1, 3, 2, 4), np.uint8)[..., ::2]},
        {"out_TCHW": [[[[0]]]]},
        {"out_TCHW": unaligned_zeros(1, 3, 2, 2), "lut_C256": np.zeros((3, 256), np.float32)},
        {"tile": (0, 1)},
        {"tile": (2, 3)},
        {"tile": 2},
        {"border": (1, 0, 4, 5)},
        {"border": (0, 0, 3, 5)},
        {"border": (0, -1, 9, 9)},
        {"border": (0, 0, 2**25, 5)},
        {"border_colour": (1, 2)},
        {"border_colour": (1, 2, 256)},
        {"canvas_colour": (1, 2, -1)},
        {"canvas": (2, 2, 1, 0)},
        {"canvas": (2, 1, 0, 0)},
        {"canvas": (2.0, 2, 0, 0)},
        {"box": (0, 0, 6, 4)},
        {"window": (0, 0, 3, 2)},
    ],
)
def test_tiles_refuse_what_does_not_fit(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        kernels.resize_tiles(RGB, 2, 2, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"dst": np.empty((1, 3, 2, 3), np.uint8)},
        {"dst": np.empty((1, 4, 2, 2), np.uint8)},
        {"dst": np.empty((0, 3, 2, 2), np.uint8)},
        {"dst": np.empty((1, 3, 0, 2), np.uint8)},
        {"dst": np.empty((1, 3, 2, 2), np.float32)},
        {"lut": np.empty((3, 256), np.float32)},
        {"lut": np.empty((4, 256), np.float32), "dst": np.empty((1, 3, 2, 2), np.float32)},
        {"lut": np.empty((3, 512), np.float32)[:, ::2], "dst": np.empty((1, 3, 2, 2), np.float32)},
        {"lut": b"", "dst": np.empty((1, 3, 2, 2), np.float32)},
        {"window": (0, 0, 0, 2)},
        {"window": (0, 0, 2**31 - 1, 2)},
        {"window": (2**31 - 1, 0, 1, 2)},
        {"border": (0, 0, 2**31 - 1, 5)},
        {"border": (-(2**31), 0, 4, 5)},
        {"border": (0, 0, 4, 4)},
        {"border_colour": b"12"},
        {"canvas_colour": b"1234"},
        {"canvas": (2, 2, 0, 1, 0, 2)},
        {"canvas": (2**31 - 1, 2, 0, 0, 0, 2)},
        {"canvas": (0, 0, 0, 0, 0, 0)},
        {"canvas": (2, 2, 0, 0, 1, 2)},
        {"canvas": (2, 2, 0, 0, -1, 2)},
        {"canvas": (2, 2, 0, 0, 0, 1)},
        {"canvas": (2, 2, 0, 0, 0, 3)},
        {"size": (2**31, 2)},
    ],
)
def test_the_binding_checks_tiles_again(change: dict[str, Any]) -> None:
    arguments = {
        "src": RGB, "dst": np.empty((1, 3, 2, 2), np.uint8), "lut": None, "resample": "box", "size": (2, 2),
        "box": (0.0, 0.0, 5.0, 4.0), "window": (0, 0, 2, 2), "border": (0, 0, 4, 5), "border_colour": b"123",
        "canvas": (2, 2, 0, 0, 0, 2), "canvas_colour": b"123", "target": None,
    }  # fmt: skip
    _kernels.resize_tiles(*arguments.values())  # type: ignore[arg-type]
    with pytest.raises((TypeError, ValueError, BufferError, OverflowError)):
        _kernels.resize_tiles(*(arguments | change).values())  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [2, 3, 100])
@pytest.mark.parametrize("lut_C256", [None, np.arange(768, dtype=np.float32).reshape(3, 256)])
def test_threads_do_not_show_in_tiles(threads: int, lut_C256: Array | None) -> None:
    options: dict[str, Any] = {"window": (3, 2, 40, 30), "canvas": (64, 48, 11, 7), "tile": (16, 16)}
    options |= {"canvas_colour": (1, 2, 3), "border": (2, 5, 110, 90), "border_colour": (9, 8, 7), "lut_C256": lut_C256}
    image_HWC = random_image(100, 80, 3)
    expected_TCHW = kernels.resize_tiles(image_HWC, 50, 44, **options)
    assert_equal(kernels.resize_tiles(image_HWC, 50, 44, threads=threads, **options), expected_TCHW)
    with pytest.raises(UsageError):
        kernels.resize_tiles(image_HWC, 50, 44, threads=0, **options)


def test_an_unaligned_table_is_as_good_as_any() -> None:
    table_C256 = unaligned_zeros(3, 256)
    table_C256[:] = np.arange(768, dtype=np.float32).reshape(3, 256)
    found = kernels.resize_tiles(RGB, 4, 5, lut_C256=table_C256)
    assert_equal(found, kernels.resize_tiles(RGB, 4, 5, lut_C256=table_C256.copy()))
