"""The frame kernels: YUV against the standards' formula, `composite` against Pillow, and every target alike.

Each comparison has a twin that damages the data and must fail.
"""

from __future__ import annotations

import mmap
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pictures import THIN
from PIL import Image

from edgevlm import _kernels, frames, kernels
from edgevlm.errors import ImageError, KernelError, UsageError

Array = NDArray[Any]

TARGETS = kernels.targets()
LAYOUTS = ("yuyv", "nv12", "i420")
MATRICES = {"bt601": (2990, 1140), "bt709": (2126, 722)}  # Kr and Kb, in units of 1 / 10000
WIDTHS = [1, 2, 3, 7, 8, 9, 10, 11, 15, 16, 17, 31, 32, 33, 34, 63, 64, 65, 66, 95, 127, 128, 129, 131]

each_target = pytest.mark.parametrize("target", TARGETS)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_range = pytest.mark.parametrize("full_range", [False, True], ids=["video", "full"])
each_matrix = pytest.mark.parametrize("matrix", MATRICES)


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def assert_equal(found: Array, expected: Array) -> None:
    """Equality in shape, type and every bit; and the comparison itself sees a single damaged bit."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()
    twin = expected.copy()
    twin.flat[-1] ^= 1
    assert found.tobytes() != twin.tobytes()


# ---- YUV: the formula ----


def exact_rgb(y: Array, u: Array, v: Array, matrix: str, full_range: bool) -> Array:
    """The formula in whole numbers: floor(value + 1/2), clipped, over one common denominator."""
    Kr, Kb = MATRICES[matrix]
    Kg = 10000 - Kr - Kb
    black, luma_steps, chroma_steps = (0, 255, 255) if full_range else (16, 219, 224)
    luma = (y.astype(np.int64) - black) * 10000 * Kg * chroma_steps
    pb, pr = ((chroma.astype(np.int64) - 128) * 2 * luma_steps for chroma in (u, v))
    sums = (
        luma + pr * (10000 - Kr) * Kg,
        luma - pb * (10000 - Kb) * Kb - pr * (10000 - Kr) * Kr,
        luma + pb * (10000 - Kb) * Kg,
    )
    denominator = 10000 * Kg * luma_steps * chroma_steps
    rounded = [(2 * 255 * value + denominator) // (2 * denominator) for value in sums]
    return np.stack(rounded, axis=-1).clip(0, 255).astype(np.uint8)


def real_rgb(y: Array, u: Array, v: Array, matrix: str, full_range: bool) -> Array:
    """The same in float64, unrounded, and written as the standards write it."""
    kr, kb = (k / 10000 for k in MATRICES[matrix])
    kg = 1 - kr - kb
    luma, pb, pr = (
        (y / 255, (u - 128.0) / 255, (v - 128.0) / 255)
        if full_range
        else ((y - 16.0) / 219, (u - 128.0) / 224, (v - 128.0) / 224)
    )
    red, blue = luma + 2 * (1 - kr) * pr, luma + 2 * (1 - kb) * pb
    return 255 * np.stack([red, (luma - kr * red - kb * blue) / kg, blue], axis=-1)


def all_chroma(y: int) -> tuple[Array, Array, Array, bytes]:
    """Every (U, V), with luma `y`: the samples of 256 x 512 pixels, and as a YUYV frame."""
    u, v = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8), indexing="ij")
    luma = np.full_like(u, y)
    frame = np.stack([luma, u, luma, v], axis=-1)
    return (*(np.repeat(plane, 2, axis=1) for plane in (luma, u, v)), frame.tobytes())


@each_matrix
@each_range
@pytest.mark.parametrize("y", [0, 1, 15, 16, 17, 93, 128, 235, 240, 255])
def test_yuv_is_the_rounded_formula_for_every_chroma_pair(matrix: str, full_range: bool, y: int) -> None:
    """The rounding depends on (U, V) only (`kernels/frames.c`), so a few lumas stand for all."""
    *planes, frame = all_chroma(y)
    expected = exact_rgb(*planes, matrix, full_range)
    for target in TARGETS:
        found = frames.yuv_to_rgb(frame, 256, 512, "yuyv", matrix=matrix, full_range=full_range, target=target)
        assert_equal(found, expected)
    formula = real_rgb(*planes, matrix, full_range).clip(0, 255)
    assert np.abs(expected - formula).max() <= 0.5 + 1e-9  # 1e-9: errors of float64
    assert np.abs(expected - real_rgb(*planes, matrix, not full_range).clip(0, 255)).max() > 1


@each_target
@each_matrix
@each_range
def test_yuv_of_every_luma(target: str, matrix: str, full_range: bool) -> None:
    y = np.arange(256, dtype=np.uint8)[None, :]
    chroma = noise(2, 64, 128, seed=2)
    u, v = (np.repeat(plane, 2, axis=1) for plane in chroma)
    frame = np.empty((64, 512), np.uint8)
    frame[:, 0::2], frame[:, 1::4], frame[:, 3::4] = y, chroma[0], chroma[1]
    found = frames.yuv_to_rgb(frame, 64, 256, "yuyv", matrix=matrix, full_range=full_range, target=target)
    assert_equal(found, exact_rgb(np.broadcast_to(y, u.shape), u, v, matrix, full_range))


@each_target
def test_ties_go_up(target: str) -> None:
    """Blue in BT.601, full range: 1.772 * (3 - 128) = -221.5 and 1.772 * (253 - 128) = 221.5."""
    frame = bytes([222, 3, 223, 128, 1, 253, 10, 128])
    found = frames.yuv_to_rgb(frame, 1, 4, "yuyv", full_range=True, target=target)
    assert found[0, :, 2].tolist() == [1, 2, 223, 232]


# Colour bars at 100 %, video range, as in BT.601: white, yellow, cyan, green, magenta, red, blue, black.
BARS = {
    (235, 128, 128): (255, 255, 255),
    (210, 16, 146): (255, 255, 0),
    (170, 166, 16): (0, 255, 255),
    (145, 54, 34): (0, 255, 0),
    (106, 202, 222): (255, 0, 255),
    (81, 90, 240): (255, 0, 0),
    (41, 240, 110): (0, 0, 255),
    (16, 128, 128): (0, 0, 0),
}


@pytest.mark.parametrize("bar", BARS)
def test_colour_bars(bar: tuple[int, int, int]) -> None:
    """Within 2: the bars themselves are rounded."""
    y, u, v = bar
    found = frames.yuv_to_rgb(bytes([y, u, y, v]), 1, 2, "yuyv")
    assert np.abs(found.astype(int) - BARS[bar]).max() <= 2


# ---- YUV: the layouts ----


def split(frame: Array, height: int, width: int, layout: str, stride: int) -> tuple[Array, Array, Array]:
    """Y, U and V of each pixel, each (height, width), by slicing and repeating."""
    n_rows, n_columns = (height + 1) // 2, (width + 1) // 2
    luma, rest = frame[: height * stride].reshape(height, stride), frame[height * stride :]
    if layout == "yuyv":
        y, u, v = luma[:, 0 : 2 * width : 2], luma[:, 1 : 4 * n_columns : 4], luma[:, 3 : 4 * n_columns : 4]
        return y, np.repeat(u, 2, axis=1)[:, :width], np.repeat(v, 2, axis=1)[:, :width]
    if layout == "nv12":
        rows = rest.reshape(n_rows, -1)
        u, v = rows[:, 0 : 2 * n_columns : 2], rows[:, 1 : 2 * n_columns : 2]
    else:
        u, v = rest.reshape(2, n_rows, -1)[:, :, :n_columns]
    whole = [np.repeat(np.repeat(plane, 2, axis=0), 2, axis=1)[:height, :width] for plane in (u, v)]
    return luma[:, :width], *whole


def size_of(layout: str, height: int, width: int, stride: int) -> int:
    if layout == "yuyv":
        return height * stride
    return height * stride + (height + 1) // 2 * ((stride + 1) // 2 * 2)


def check_layout(target: str, layout: str, height: int, width: int, padding: int | None) -> None:
    """`padding`: bytes after each row; None: let `stride` have its default."""
    packed = (width + 1) // 2 * 4 if layout == "yuyv" else width
    stride = packed + (padding or 0)
    frame = noise(size_of(layout, height, width, stride), seed=width)
    argument = None if padding is None else stride
    found = frames.yuv_to_rgb(frame, height, width, layout, stride=argument, target=target)
    assert_equal(found, exact_rgb(*split(frame, height, width, layout, stride), "bt601", False))


@each_target
@each_layout
@pytest.mark.parametrize("width", WIDTHS)
def test_widths_around_the_lanes(target: str, layout: str, width: int) -> None:
    for height in (1, 2, 3):
        check_layout(target, layout, height, width, None)


@each_target
@each_layout
@settings(max_examples=60 // THIN, deadline=None)
@given(st.integers(1, 9), st.integers(1, 200), st.none() | st.integers(0, 70))
def test_sizes_and_strides(target: str, layout: str, height: int, width: int, padding: int | None) -> None:
    check_layout(target, layout, height, width, padding)


def test_layouts_worked_out_by_hand() -> None:
    """Four lumas over neutral chroma; then equal lumas over two chroma samples, bluish and reddish."""
    grey = [[[0] * 3, [255] * 3], [[76] * 3, [150] * 3]]
    assert frames.yuv_to_rgb(bytes([16, 128, 235, 128, 81, 128, 145, 128]), 2, 2, "yuyv").tolist() == grey
    for layout in LAYOUTS[1:]:
        assert frames.yuv_to_rgb(bytes([16, 235, 81, 145, 128, 128]), 2, 2, layout).tolist() == grey
    luma = [81] * 8
    wide = frames.yuv_to_rgb(bytes([*luma, 240, 90, 90, 240]), 2, 4, "nv12")  # U0 V0 U1 V1
    assert_equal(frames.yuv_to_rgb(bytes([*luma, 240, 90, 90, 240]), 2, 4, "i420"), wide)  # U0 U1 V0 V1
    assert_equal(frames.yuv_to_rgb(bytes([81, 240, 81, 90, 81, 90, 81, 240] * 2), 2, 4, "yuyv"), wide)
    assert wide[0].tolist() == wide[1].tolist() == [[15, 63, 255]] * 2 + [[254, 0, 0]] * 2
    tall = frames.yuv_to_rgb(bytes([*luma, 240, 90, 90, 240]), 4, 2, "nv12")
    assert_equal(tall, np.ascontiguousarray(wide.transpose(1, 0, 2)))


@each_target
@each_layout
@pytest.mark.parametrize("width", WIDTHS)
def test_yuv_writes_only_its_output(target: str, layout: str, width: int) -> None:
    frame = noise(_kernels.yuv_size(layout, 3, width, 0))
    guarded = np.full(9 * width + 257, 0xA5, dtype=np.uint8)
    out_HWC = guarded[129 : 129 + 9 * width].reshape(3, width, 3)
    _kernels.yuv_to_rgb(frame, out_HWC, layout, "bt709", False, 0, target)
    assert_equal(out_HWC, frames.yuv_to_rgb(frame, 3, width, layout, matrix="bt709", target="scalar"))
    assert guarded[:129].tobytes() + guarded[129 + 9 * width :].tobytes() == b"\xa5" * 257


@each_target
@each_layout
def test_frames_may_lie_anywhere(target: str, layout: str) -> None:
    """Buffers, shapes, strides and alignments do not matter."""
    n = _kernels.yuv_size(layout, 6, 70, 0)
    frame = noise(n)
    expected = frames.yuv_to_rgb(frame, 6, 70, layout, target="scalar")
    shifted = np.zeros(n + 7, np.uint8)
    shifted[5 : 5 + n] = frame
    spaced = np.zeros((n, 3), np.uint8)
    spaced[:, 1] = frame
    pages = mmap.mmap(-1, n)
    pages.write(frame.tobytes())
    sources: list[Any] = [frame.tobytes(), bytearray(frame), memoryview(frame.tobytes()), pages, shifted[5 : 5 + n]]
    sources += [spaced[:, 1], np.ascontiguousarray(frame[::-1])[::-1], frame.reshape(-1, 70), frame.reshape(6, -1, 1)]
    for source in sources:
        assert_equal(frames.yuv_to_rgb(source, 6, 70, layout, target=target), expected)


# ---- composite ----


def pillow_composite(image_HWC: Array, background: tuple[int, int, int]) -> Array:
    rgba = Image.fromarray(np.ascontiguousarray(image_HWC))
    rgb = Image.new("RGB", rgba.size, background)
    rgb.paste(rgba, mask=rgba)
    return np.array(rgb)


def test_composite_equals_pillow_for_every_colour_and_alpha() -> None:
    colour, alpha = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    image_HWC = np.stack([colour, colour[::-1], colour.T, alpha], axis=-1)
    for start in range(0, 256, 3):
        background = (start, min(start + 1, 255), min(start + 2, 255))
        expected = pillow_composite(image_HWC, background)
        for target in TARGETS:
            assert_equal(frames.composite(image_HWC, background, target), expected)


@each_target
@pytest.mark.parametrize("width", WIDTHS)
def test_composite_writes_only_its_output(target: str, width: int) -> None:
    image_HWC = noise(3, width, 4, seed=width)
    guarded = np.full(9 * width + 257, 0xA5, dtype=np.uint8)
    out_HWC = guarded[129 : 129 + 9 * width].reshape(3, width, 3)
    _kernels.composite(image_HWC, out_HWC, (7, 200, 31), target)
    assert_equal(out_HWC, pillow_composite(image_HWC, (7, 200, 31)))
    assert guarded[:129].tobytes() + guarded[129 + 9 * width :].tobytes() == b"\xa5" * 257


# ---- mean_abs_diff ----


@each_target
@settings(max_examples=100 // THIN, deadline=None)
@given(st.integers(1, 9), st.integers(1, 300), st.sampled_from([1, 3, 4]), st.integers(0, 99))
def test_difference_is_the_mean(target: str, height: int, width: int, channels: int, seed: int) -> None:
    a_HWC, b_HWC = noise(2, height, width, channels, seed=seed)
    total = int(np.abs(a_HWC.astype(np.int64) - b_HWC).sum())
    assert frames.mean_abs_diff(a_HWC, b_HWC, target) == total / a_HWC.size
    damaged = a_HWC.copy()
    damaged.flat[-1] ^= 1
    assert frames.mean_abs_diff(damaged, b_HWC, target) != total / a_HWC.size
    assert frames.mean_abs_diff(a_HWC, a_HWC.copy(), target) == 0.0


@each_target
def test_difference_of_large_frames_does_not_overflow(target: str) -> None:
    """255 * 2^25 > 2^32: every narrow accumulator would show."""
    black, white = np.zeros((4096, 8192), np.uint8), np.full((4096, 8192), 255, np.uint8)
    assert frames.mean_abs_diff(black, white, target) == 255.0
    white[4095, 8191] = 254
    assert frames.mean_abs_diff(black, white, target) == 255.0 - 2.0**-25


# ---- memory layouts of pictures ----


def views(image_HWC: Array) -> list[Array]:
    """One picture at odd addresses, with padded rows, with spaced and with reversed pixels."""
    height, width, channels = image_HWC.shape
    odd = np.zeros(image_HWC.size + 3, np.uint8)[3:].reshape(image_HWC.shape)
    padded = np.zeros((height, width + 5, channels), np.uint8)[:, 2 : width + 2]
    spaced = np.zeros((height, width, channels + 2), np.uint8)[:, :, 1 : channels + 1]
    reversed_ = np.zeros_like(image_HWC)[::-1, ::-1]
    for view in (odd, padded, spaced, reversed_):
        view[:] = image_HWC
    return [odd, padded, spaced, reversed_, np.asfortranarray(image_HWC)]


@each_target
def test_memory_layout_does_not_matter(target: str) -> None:
    image_HWC, other_HWC = noise(2, 9, 37, 4)
    expected, mean = frames.composite(image_HWC), frames.mean_abs_diff(image_HWC, other_HWC)
    for view_HWC in views(image_HWC):
        assert_equal(frames.composite(view_HWC, target=target), expected)
        for other in (other_HWC, *views(other_HWC)):
            assert frames.mean_abs_diff(view_HWC, other, target) == mean


# ---- refusals ----

FRAME = bytes(24)  # 4 x 4 in nv12 and i420


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frame": bytes(23)}, "4 x 4 pixels has 24 bytes, found 23"),
        ({"frame": b""}, "found 0"),
        ({"frame": bytes(25)}, "found 25"),
        ({"layout": "yuyv"}, "has 32 bytes"),
        ({"stride": 5}, "and stride 5 has 32 bytes"),
        ({"stride": 3}, "stride=3: a row of 4 pixels in nv12 takes 4 bytes"),
        ({"stride": 0}, "stride=0"),
        ({"stride": -4}, "stride=-4"),
        ({"stride": 2**40}, "stride="),
        ({"stride": 2**70}, "too large"),
        ({"stride": 4.0}, "whole numbers"),
        ({"height": 0}, "sides go from 1"),
        ({"width": -4}, "sides go from 1"),
        ({"height": 2**24 + 1}, "sides go from 1"),
        ({"width": 2**70}, "too large"),
        ({"width": "4"}, "whole numbers"),
        ({"height": None}, "whole numbers"),
        ({"layout": "nv21"}, "use yuyv, nv12 or i420"),
        ({"layout": "nv12\0"}, "null character"),
        ({"layout": None}, "use yuyv"),
        ({"matrix": "bt2020"}, "use bt601 or bt709"),
    ],
)
def test_wrong_frames_are_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"frame": FRAME, "height": 4, "width": 4, "layout": "nv12"} | change
    with pytest.raises(UsageError, match=message):
        frames.yuv_to_rgb(**arguments)
    assert frames.yuv_to_rgb(FRAME, 4, 4, "nv12").shape == (4, 4, 3)


@pytest.mark.parametrize(
    "frame", [None, 24, "x" * 24, list(FRAME), np.zeros(24), np.zeros(24, np.int8), memoryview(FRAME)[::-1], [FRAME]]
)
def test_what_is_not_a_block_of_bytes_is_refused(frame: Any) -> None:
    with pytest.raises(ImageError, match="buffer of bytes or a uint8 array"):
        frames.yuv_to_rgb(frame, 4, 4, "nv12")


@pytest.mark.parametrize("background", [(0, 0), (0, 0, 0, 0), (0, 0, 256), (-1, 0, 0), (0.5, 0, 0), "abc", 7, None])
def test_wrong_backgrounds_are_refused(background: Any) -> None:
    with pytest.raises(UsageError, match="three whole numbers"):
        frames.composite(noise(2, 2, 4), background)


def test_wrong_pictures_are_refused() -> None:
    for bad in (
        noise(2, 2, 3),
        noise(2, 2),
        noise(2, 2, 4).astype(float),
        np.zeros((0, 2, 4), np.uint8),
        b"abcd",
        None,
    ):
        with pytest.raises(ImageError):
            frames.composite(bad)  # type: ignore[arg-type]
    for bad in (noise(2, 2).astype(np.int16), noise(2, 2, 2), None):
        with pytest.raises(ImageError):
            frames.mean_abs_diff(bad, bad)  # type: ignore[arg-type]
    for other in (noise(2, 3), noise(3, 2), noise(2, 2, 3), noise(2, 2, 1)):
        with pytest.raises(UsageError, match="one shape"):
            frames.mean_abs_diff(noise(2, 2), other)


@pytest.mark.parametrize("call", ["yuv", "composite", "difference"])
def test_unknown_targets_are_refused(call: str) -> None:
    with pytest.raises(KernelError, match="this CPU runs: scalar"):
        CALLS[call]("sse9")


anything = st.sampled_from(
    [None, -1, 0, 40, 2**24, 2**31, 2**63, 2**70, 1.5, float("nan"), "", "nv12\0", "é", b"x", []]
)
small = st.integers(1, 8)


@settings(max_examples=100 // THIN, deadline=None)
@given(
    st.binary(max_size=100) | anything,
    small | anything,
    small | anything,
    st.sampled_from(LAYOUTS) | anything,
    st.sampled_from(sorted(MATRICES)) | anything,
    st.none() | small | anything,
)
def test_hostile_frames(frame: Any, height: Any, width: Any, layout: Any, matrix: Any, stride: Any) -> None:
    """A picture comes out, or one of our errors."""
    try:
        found = frames.yuv_to_rgb(frame, height, width, layout, matrix=matrix, stride=stride)
    except (UsageError, ImageError):
        return
    assert found.shape == (height, width, 3)


@settings(max_examples=100 // THIN, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=4), st.lists(st.integers(0, 5), max_size=4), st.lists(anything, max_size=4))
def test_hostile_pictures(a: list[int], b: list[int], background: list[Any]) -> None:
    for call in (
        lambda: frames.composite(np.zeros(a, np.uint8), background),
        lambda: frames.mean_abs_diff(np.zeros(a, np.uint8), np.ones(b, np.uint8)),
    ):
        try:
            call()
        except (UsageError, ImageError):
            continue


@pytest.mark.parametrize(
    "arguments",
    [
        ("yuv_to_rgb", bytes(23), np.empty((4, 4, 3), np.uint8), "nv12", "bt601", False, 0, None),
        ("yuv_to_rgb", bytes(24), np.empty((4, 4, 4), np.uint8), "nv12", "bt601", False, 0, None),
        ("yuv_to_rgb", bytes(24), np.empty((4, 4, 3), np.uint8), "nv12", "bt601", False, 3, None),
        ("yuv_to_rgb", bytes(24), np.empty((4, 4, 3), np.uint8), "nv12", "bt601", False, -1, None),
        ("yuv_to_rgb", bytes(24), np.empty((4, 4, 3), np.uint8)[::-1], "nv12", "bt601", False, 0, None),
        ("yuv_to_rgb", bytes(24), bytes(48), "nv12", "bt601", False, 0, None),
        ("yuv_to_rgb", noise(48)[::2], np.empty((4, 4, 3), np.uint8), "nv12", "bt601", False, 0, None),
        ("yuv_to_rgb", noise(4, 6), np.empty((4, 4, 3), np.uint8), "nv12", "bt601", False, 0, None),
        ("yuv_size", "nv12", 2**63, 1, 0),
        ("yuv_size", "nv12", 0, 1, 0),
        ("composite", noise(2, 2, 4), np.empty((2, 2, 4), np.uint8), (0, 0, 0), None),
        ("composite", noise(2, 2, 4), np.empty((2, 3, 3), np.uint8), (0, 0, 0), None),
        ("composite", noise(2, 2, 4), np.empty((2, 2, 3), np.uint8), (0, 0, 256), None),
        ("composite", noise(2, 2, 4)[:, ::-1], np.empty((2, 2, 3), np.uint8), (0, 0, 0), None),
        ("sum_abs_diff", noise(2, 2, 4), noise(2, 2, 3), None),
        ("sum_abs_diff", noise(2, 2), noise(2, 2), None),
    ],
)
def test_the_binding_checks_again(arguments: tuple[Any, ...]) -> None:
    """The C side must not trust even our own wrapper."""
    with pytest.raises((TypeError, ValueError, OverflowError, BufferError)):
        getattr(_kernels, arguments[0])(*arguments[1:])


# ---- the GIL ----

LARGE_HWC = noise(1500, 2000, 4)
CALLS: dict[str, Callable[[str | None], object]] = {
    "yuv": lambda target: frames.yuv_to_rgb(LARGE_HWC.reshape(-1)[:6_000_000], 1500, 2000, "yuyv", target=target),
    "composite": lambda target: frames.composite(LARGE_HWC, target=target),
    "difference": lambda target: frames.mean_abs_diff(LARGE_HWC, LARGE_HWC, target),
    "resize": lambda target: kernels.resize(LARGE_HWC, 100, 100, target=target),
    "tiles": lambda target: kernels.resize_tiles(LARGE_HWC, 100, 100, target=target),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_gil_is_released(call: str) -> None:
    """Python may not switch threads by itself here, so the other thread only runs if the kernel lets it."""
    go, ran = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: go.wait() and ran.set())
    interval = sys.getswitchinterval()
    thread.start()
    try:
        sys.setswitchinterval(1000)
        go.set()
        for _ in range(300):
            CALLS[call]("scalar")
            if ran.is_set():
                break
        assert ran.is_set()
    finally:
        sys.setswitchinterval(interval)
        thread.join()
