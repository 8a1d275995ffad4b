"""The kernels against Pillow, bit for bit, and every SIMD target against the scalar one.

Each comparison has a twin that damages the data by one unit and must fail.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided
from pictures import THIN
from resampling import FILTERS, Array, assert_equal, image, pillow_resize, random_image, side

from edgevlm import _kernels, kernels
from edgevlm._arrays import check_image
from edgevlm.errors import ImageError, KernelError, UsageError

TARGETS = kernels.targets()


def test_the_reference_is_the_pillow_we_copy() -> None:
    """Pillow 13 changed the order of the passes; with an older one the comparisons below mean something else."""
    assert int(PIL.__version__.split(".")[0]) >= 13


# ---- resize, against Pillow ----


@st.composite
def boxes(draw: st.DrawFn, height: int, width: int) -> tuple[float, float, float, float] | None:
    """None, fractional, or whole numbers; also empty ones, which Pillow accepts."""
    kind = draw(st.sampled_from(["none", "float", "int"]))
    if kind == "none":
        return None
    steps = 2**20 if kind == "float" else 8
    number = st.integers(0, steps).map(lambda n: n / steps)
    xs = sorted(draw(number) * width for _ in range(2))
    ys = sorted(draw(number) * height for _ in range(2))
    if kind == "int":
        xs, ys = [float(round(x)) for x in xs], [float(round(y)) for y in ys]
    return xs[0], ys[0], xs[1], ys[1]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("resample", FILTERS)
def test_every_small_size_equals_pillow(target: str, resample: str) -> None:
    """All pairs of 1, 3, ..., 65, in one direction along x and in the other along y."""
    for before in range(1, 66, 2 * THIN):
        for after in range(1, 66, 2 * THIN):
            image_HWC = random_image(before, after, (1, 3, 4)[(before + after) // 2 % 3], seed=before + after // 2)
            found = kernels.resize(image_HWC, after, before, resample, target=target)
            assert_equal(found, pillow_resize(image_HWC, after, before, resample))


@pytest.mark.parametrize("target", TARGETS)
def test_two_thousand_random_cases_equal_pillow(target: str) -> None:
    rng = np.random.default_rng(7)
    for case in range(2000 // THIN):
        before, after = rng.integers(1, [4, 40, 300][case % 3], (2, 2), endpoint=True)
        image_HWC = random_image(*before, (1, 3, 4)[case % 7 % 3], seed=case)
        resample = list(FILTERS)[case % 5]
        y0, y1 = sorted(rng.random(2) * before[0])
        x0, x1 = sorted(rng.random(2) * before[1])
        box = (x0, y0, x1, y1) if rng.random() < 0.5 else None
        found = kernels.resize(image_HWC, *after, resample, box, target)
        assert_equal(found, pillow_resize(image_HWC, *after, resample, box))


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=150 // THIN, deadline=None)
@given(image, side, side, st.sampled_from(sorted(FILTERS)), st.data())
def test_resize_equals_pillow(
    target: str, shape: Any, height: int, width: int, resample: str, data: st.DataObject
) -> None:
    image_HWC = random_image(*shape)
    box = data.draw(boxes(*image_HWC.shape[:2]))
    found = kernels.resize(image_HWC, height, width, resample, box, target)
    assert_equal(found, pillow_resize(image_HWC, height, width, resample, box))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize(
    ("source", "result"),
    [
        ((1, 1), (1, 1)),
        ((1, 1), (300, 200)),
        ((1, 1), (4000, 1)),
        ((1, 1), (1, 4000)),
        ((4000, 1), (1, 1)),
        ((1, 4000), (1, 1)),
        ((10000, 1), (1, 10000)),
        ((1, 10000), (10000, 1)),
        ((1, 5000), (1, 1)),
        ((5000, 1), (1, 1)),
        ((5000, 1), (7, 9)),
        ((1, 5000), (3, 2)),
        ((3000, 2000), (1, 1)),
        ((2, 3), (1500, 1)),
        ((700, 900), (700, 30)),
        ((700, 900), (30, 900)),
        ((700, 900), (701, 899)),
    ],
)
def test_resize_extremes_equal_pillow(target: str, resample: str, source: Any, result: Any) -> None:
    image_HWC = random_image(*source, 3, seed=1)
    assert_equal(
        kernels.resize(image_HWC, *result, resample, target=target), pillow_resize(image_HWC, *result, resample)
    )


@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize(("height", "width"), [(12, 9), (12, 20), (25, 9), (30, 31)])
def test_a_box_of_the_output_s_size_only_shifts(resample: str, height: int, width: int) -> None:
    """Pillow skips a pass only without a box on that axis; we also skip one that would return its input."""
    image_HWC = random_image(30, 31, 3, seed=1)
    box = (4, 3, 13, 15) if (height, width) != (30, 31) else (0, 0, 31, 30)
    found = kernels.resize(image_HWC, height, width, resample, box)
    assert_equal(found, pillow_resize(image_HWC, height, width, resample, box))


@pytest.mark.parametrize("lost_columns", [-3, -1, 0, 1, 7])
@pytest.mark.parametrize("surplus", [0, 1])
def test_pass_order_at_its_threshold(lost_columns: int, surplus: int) -> None:
    """Along y first if more than twice as many rows as columns are lost, and at least one. The two orders must differ
    on this picture, or the test would show nothing."""
    lost_rows = max(2 * lost_columns, 0) + surplus
    image_HWC = random_image(60, 40, 3, seed=1)
    height, width = 60 - lost_rows, 40 - lost_columns
    found = kernels.resize(image_HWC, height, width)
    assert_equal(found, pillow_resize(image_HWC, height, width, "bicubic"))
    if lost_rows and lost_columns:
        x_first = kernels.resize(kernels.resize(image_HWC, 60, width), height, width)
        y_first = kernels.resize(kernels.resize(image_HWC, height, 40), height, width)
        assert x_first.tobytes() != y_first.tobytes()
        assert_equal(found, y_first if surplus else x_first)


# Small pictures, worked out by hand but for the last, which is Pillow's. Bicubic halving weighs its neighbours
# -6 -18 58 222 222 58 -18 -6 (of 512; at a border, what is left of them is scaled up).
HEX_PICTURES = [
    ("box", "00 ff 00 ff", (1, 4), (1, 2), "80 80"),
    ("bilinear", "00 ff", (1, 2), (1, 4), "00 40 bf ff"),
    ("bicubic", "00 00 ff ff", (1, 4), (1, 2), "15 ea"),
    ("bicubic", "e1 e1 3c 3c / e1 e1 3c 3c / c3 c3 5a 5a / c3 c3 5a 5a", (4, 4), (2, 2), "d1 4c / bc 61"),
    ("lanczos", "00 00 00 ff", (1, 4), (1, 8), "00 02 07 00 00 41 ce ff"),
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("resample", "before", "source", "result", "after"), HEX_PICTURES)
def test_hex_pictures(target: str, resample: str, before: str, source: Any, result: Any, after: str) -> None:
    image_HW = np.frombuffer(bytes.fromhex(before.replace("/", "")), np.uint8).reshape(source)
    found_HW = kernels.resize(image_HW, *result, resample, target=target)
    assert " / ".join(row.tobytes().hex(" ") for row in found_HW) == after


# ---- properties that need no reference ----


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=150 // THIN, deadline=None)
@given(image, side, side, st.sampled_from(sorted(FILTERS)), st.data())
def test_window_is_a_slice(
    target: str, shape: Any, height: int, width: int, resample: str, data: st.DataObject
) -> None:
    image_HWC = random_image(*shape)
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    rows, columns = data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left))
    found = kernels.resize(image_HWC, height, width, resample, target=target, window=(top, left, rows, columns))
    whole = kernels.resize(image_HWC, height, width, resample, target=target)
    assert_equal(found, np.ascontiguousarray(whole[top : top + rows, left : left + columns]))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 5), (16, 33), (90, 100), (40, 17), (5, 40)])
def test_resize_writes_only_its_output(target: str, channels: int, height: int, width: int) -> None:
    image_HWC = random_image(41, 33, channels)
    guarded = np.full(height * width * channels + 128, 0xA5, dtype=np.uint8)
    out_HWC = guarded[64:-64].reshape(height, width, channels)
    _kernels.resize(image_HWC, out_HWC, "lanczos", (height, width), (0.0, 0.0, 33.0, 41.0), (0, 0), target)
    assert_equal(out_HWC, pillow_resize(image_HWC, height, width, "lanczos"))
    assert guarded[:64].tobytes() == guarded[-64:].tobytes() == b"\xa5" * 64


@pytest.mark.parametrize("threads", [2, 3, 50])
def test_threads_do_not_show(threads: int) -> None:
    for size in ((37, 29), (200, 3), (1, 90)):
        image_HWC = random_image(90, 60, 3)
        assert_equal(kernels.resize(image_HWC, *size, threads=threads), pillow_resize(image_HWC, *size, "bicubic"))


def layouts() -> dict[str, Array]:
    """Pictures of one content and different memory layouts."""
    base_HWC = random_image(20, 24, 3)
    wide_HWC = np.zeros((20, 30, 4), dtype=np.uint8)
    wide_HWC[:, 3:27, :3] = base_HWC
    upside_down_HWC = np.ascontiguousarray(base_HWC[::-1, ::-1])
    read_only_HWC = base_HWC.copy()
    read_only_HWC.flags.writeable = False
    spaced_bytes = np.full(20 * 24 * 4 - 1, 255, dtype=np.uint8)
    spaced_HWC = as_strided(spaced_bytes, base_HWC.shape, (24 * 4, 4, 1))
    spaced_HWC[:] = base_HWC
    padded_rows_HWC = np.zeros((20, 40, 3), dtype=np.uint8)
    padded_rows_HWC[:, :24] = base_HWC
    return {
        "contiguous": base_HWC,
        "slice of RGBA": wide_HWC[:, 3:27, :3],
        "RGB in four bytes, to the last": spaced_HWC,
        "negative strides": upside_down_HWC[::-1, ::-1],
        "Fortran order": np.asfortranarray(base_HWC),
        "read-only": read_only_HWC,
        "padded rows": padded_rows_HWC[:, :24],
        "CHW transposed": np.ascontiguousarray(base_HWC.transpose(2, 0, 1)).transpose(1, 2, 0),
    }


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", layouts())
def test_memory_layout_does_not_matter(layout: str, target: str) -> None:
    image_HWC, lut_C256 = layouts()[layout], np.arange(768, dtype=np.float32).reshape(3, 256)
    assert np.array_equal(image_HWC, layouts()["contiguous"])
    for height, width in ((9, 11), (20, 11), (9, 24), (20, 24), (3, 30), (1, 1)):
        expected_HWC = pillow_resize(image_HWC, height, width, "bicubic")
        assert_equal(kernels.resize(image_HWC, height, width, target=target), expected_HWC)
    expected_CHW = np.ascontiguousarray(image_HWC.transpose(2, 0, 1).astype(np.float32))
    expected_CHW += np.array([0, 256, 512], dtype=np.float32)[:, None, None]
    assert_equal(kernels.resize_tiles(image_HWC, 20, 24, lut_C256=lut_C256, target=target)[0], expected_CHW)


def test_rgb_in_four_bytes_is_not_copied() -> None:
    rgbx_HWC = np.zeros((20, 24, 4), dtype=np.uint8)
    assert check_image(rgbx_HWC[:, :, :3], spaced=True).base is rgbx_HWC
    assert check_image(rgbx_HWC[:, :, :3]).base is None
    assert check_image(rgbx_HWC[:, ::2, :3], spaced=True).base is None


def test_grey_keeps_two_axes() -> None:
    grey_HW = random_image(9, 8, 1)[:, :, 0]
    found_HW = kernels.resize(grey_HW, 5, 4)
    assert_equal(found_HW, pillow_resize(grey_HW[:, :, None], 5, 4, "bicubic")[:, :, 0])
    assert found_HW.flags.c_contiguous


# ---- refusals ----


RGB = random_image(4, 5, 3)


@pytest.mark.parametrize(
    "bad",
    [
        RGB.astype(np.float32),
        RGB.astype(np.int8),
        RGB > 127,
        np.zeros((), np.uint8),
        np.zeros(5, np.uint8),
        np.zeros((2, 2, 2), np.uint8),
        np.zeros((3, 4, 5), np.uint8),
        np.zeros((0, 5, 3), np.uint8),
        np.zeros((1, 2, 3, 3), np.uint8),
        RGB.tolist(),
        None,
    ],
)
def test_what_is_not_a_picture_is_refused(bad: Any) -> None:
    with pytest.raises(ImageError) as caught:
        kernels.resize(bad, 2, 2)
    assert caught.value.code == "image.array"


@pytest.mark.parametrize(
    "change",
    [
        {"height": 0},
        {"height": -1},
        {"width": 2**24 + 1, "window": (0, 0, 1, 1)},
        {"width": 2**70},
        {"width": 2.5},
        {"resample": "nearest"},
        {"resample": ""},
        {"box": (0, 0, 6, 4)},
        {"box": (-0.1, 0, 5, 4)},
        {"box": (3, 0, 2, 4)},
        {"box": (0, 0, float("nan"), 4)},
        {"box": (0, 0, float("inf"), 4)},
        {"box": (0, 0, 5)},
        {"box": "abcd"},
        {"window": (0, 0, 3, 2)},
        {"window": (0, 0, 0, 2)},
        {"window": (-1, 0, 1, 1)},
        {"window": (0, 2**40, 1, 1)},
        {"window": (0, 0)},
        {"threads": 0},
        {"threads": 1.5},
    ],
)
def test_what_is_out_of_range_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        kernels.resize(RGB, **{"height": 2, "width": 2} | change)


@pytest.mark.parametrize(
    ("source", "out"),
    [
        (RGB[:, :, ::-1], np.empty((2, 2, 3), np.uint8)),  # pixels not packed
        (RGB, np.empty((2, 2, 4), np.uint8)),
        (RGB, np.empty((2, 3, 3), np.uint8)),  # larger than the output
        (RGB.astype(np.float32), np.empty((2, 2, 3), np.uint8)),
        (RGB, np.empty((2, 2), np.uint8)),
        (b"abc", np.empty((2, 2, 3), np.uint8)),
        (RGB, np.frombuffer(bytes(12), np.uint8).reshape(2, 2, 3)),  # read-only
    ],
)
def test_the_binding_checks_again(source: Any, out: Array) -> None:
    """The C side must not trust even our own wrapper."""
    with pytest.raises((TypeError, ValueError, BufferError)):
        _kernels.resize(source, out, "box", (2, 2), (0.0, 0.0, 5.0, 4.0), (0, 0), None)


# ---- targets ----


def test_scalar_is_always_there_and_slowest() -> None:
    assert TARGETS[0] == "scalar"
    assert kernels.active_target() in TARGETS


@pytest.mark.parametrize("name", ["sse9", "a" + "é" * 64, "\N{SNOWMAN}" * 30])
def test_unknown_target_lists_the_valid_ones(name: str) -> None:
    """Also where the name is cut inside a character."""
    with pytest.raises(KernelError, match="this CPU runs: scalar") as caught:
        kernels.resize(RGB, 2, 2, target=name)
    assert caught.value.code == "kernels.unknown_target"


@pytest.mark.parametrize(
    ("value", "expected"), [("scalar", "scalar"), ("", TARGETS[-1]), ("avx9", "kernels.unknown_target")]
)
def test_environment_chooses_the_target(value: str, expected: str) -> None:
    program = (
        "from edgevlm import errors, kernels\n"
        "try: print(kernels.active_target())\n"
        "except errors.KernelError as error: print(error.code)\n"
    )
    environment = os.environ | {"EDGEVLM_KERNELS": value}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
