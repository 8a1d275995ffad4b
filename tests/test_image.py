"""Loading pictures: every kind of source, every mode, every way up."""

from __future__ import annotations

import gc
import io
import operator
import struct
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import Array, assert_image, code_of, encoded, exif, noise, on_white, smooth
from PIL import Image

from edgevlm.image import load_image

# ---- kinds of source ----


def test_path_bytes_image_and_array_agree(tmp_path: Path) -> None:
    image_HWC = noise()
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(image_HWC))
    data = path.read_bytes()
    sources = [path, str(path), data, bytearray(data), memoryview(data), Image.fromarray(image_HWC), image_HWC]
    for source in [*sources, Image.open(io.BytesIO(data))]:
        assert_image(load_image(source), image_HWC)


@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats(form: str, options: dict[str, Any]) -> None:
    assert_image(load_image(encoded(noise(), form, **options)), noise())


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
def test_jpeg_is_pillow_s(options: dict[str, Any]) -> None:
    data = encoded(smooth(), "JPEG", **options)
    assert_image(load_image(data), np.array(Image.open(io.BytesIO(data))))


def test_mpo_gives_the_first_picture() -> None:
    first, second = Image.fromarray(smooth()), Image.fromarray(255 - smooth())
    data = encoded(first, "MPO", save_all=True, append_images=[second], quality=95)
    assert abs(load_image(data).astype(int) - smooth()).mean() < 3  # JPEG at quality 95, in sample units


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_animation_gives_the_first_frame(form: str) -> None:
    frames = [Image.fromarray(noise()), Image.fromarray(255 - noise())]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], lossless=True)
    assert_image(load_image(data), noise())


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 3), (200, 1)])
def test_tiny_pictures(size: tuple[int, int]) -> None:
    assert_image(load_image(encoded(noise(*size))), noise(*size))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_an_rgb_file_is_decoded_in_place(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(RGB, form, lossless=True)
    found = load_image(data)
    assert found.strides == (RGB.shape[1] * 4, 4, 1)  # as the decoder left it
    # it is not a public name: it may change or go away
    monkeypatch.setattr("PIL.Image.core.map_buffer", lambda *_: operator.index("other arguments"))
    assert_image(load_image(data), np.ascontiguousarray(found))
    monkeypatch.delattr("PIL.Image.core.map_buffer")
    assert_image(load_image(data), np.ascontiguousarray(found))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_pixels_are_freed_with_their_last_user(form: str) -> None:
    """Not whenever the garbage collector comes: 48 MB of a phone's picture would wait for it."""
    data = encoded(RGB, form)
    gc.disable()
    try:
        image_HWC = load_image(data)
        memory = weakref.ref(image_HWC.base)
        assert memory() is not None
        del image_HWC
        assert memory() is None
    finally:
        gc.enable()


# ---- arrays ----


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1)])
def test_grey_arrays_are_repeated(shape: tuple[int, ...]) -> None:
    grey = noise(5, 7, 1).reshape(shape)
    assert_image(load_image(grey), np.repeat(noise(5, 7, 1), 3, axis=2))


def test_rgba_arrays_are_composited() -> None:
    rgba_HWC = noise(30, 40, 4)
    assert_image(load_image(rgba_HWC), on_white(rgba_HWC[:, :, :3], rgba_HWC[:, :, 3:]))


def test_array_layout_does_not_matter() -> None:
    image_HWC = noise()
    assert_image(load_image(np.asfortranarray(image_HWC)), image_HWC)
    assert_image(load_image(image_HWC[::-1, ::2]), np.ascontiguousarray(image_HWC[::-1, ::2]))


@pytest.mark.parametrize(
    "bad",
    [
        noise().astype(np.float32),
        noise() > 3,
        noise().astype(np.int8),
        noise().transpose(2, 0, 1),
        np.zeros((2, 2, 2), np.uint8),
        np.zeros(4, np.uint8),
        np.uint8(3),
        None,
        7,
        [[1]],
        io.BytesIO(),
    ],
)
def test_other_objects_are_refused(bad: Any) -> None:
    assert code_of(bad) == "image.array"


def test_an_empty_array_is_refused() -> None:
    assert code_of(np.zeros((0, 4, 3), np.uint8)) == "image.undecodable"


# ---- modes ----

GREY = noise(channels=1)[:, :, 0]
ALPHA = noise(channels=4)[:, :, 3]
RGB = noise()
GREY_RGB = np.repeat(GREY[:, :, None], 3, axis=2)
WIDE = np.random.default_rng(5).integers(0, 65536, GREY.shape).astype(np.uint16)
WIDE_RGB = np.repeat((WIDE >> 8).astype(np.uint8)[:, :, None], 3, axis=2)


def grey_alpha() -> Image.Image:
    return Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])


def rgb_alpha() -> Image.Image:
    return Image.merge("RGBA", [*Image.fromarray(RGB).split(), Image.fromarray(ALPHA)])


def palette(**info: Any) -> Image.Image:
    """Indices 0..7 into eight colours."""
    image = Image.fromarray(GREY % 8).convert("P")
    image.putpalette(COLOURS.tobytes(), "RGB")
    image.info.update(info)
    return image


COLOURS = noise(1, 8)[0]
INDEXED = COLOURS[GREY % 8]
SEE_THROUGH = on_white(INDEXED, np.where(GREY % 8 == 3, 0, 255)[:, :, None])
PREMULTIPLIED = np.array(rgb_alpha().convert("RGBa").convert("RGBA"))

MODES: dict[str, tuple[Image.Image, Array]] = {
    "1": (Image.fromarray(GREY > 127), np.where(GREY_RGB > 127, 255, 0).astype(np.uint8)),
    "L": (Image.fromarray(GREY), GREY_RGB),
    "LA": (grey_alpha(), on_white(GREY_RGB, ALPHA[:, :, None])),
    "La": (grey_alpha().convert("La"), np.array([])),
    "P": (palette(), INDEXED),
    "P, one transparent index": (palette(transparency=3), SEE_THROUGH),
    "P, alpha for each index": (palette(transparency=bytes([255, 255, 255, 0])), SEE_THROUGH),
    "PA": (palette(transparency=3).convert("PA"), SEE_THROUGH),
    "RGB": (Image.fromarray(RGB), RGB),
    "RGBX": (Image.fromarray(RGB).convert("RGBX"), RGB),
    "RGBA": (rgb_alpha(), on_white(RGB, ALPHA[:, :, None])),
    "RGBa": (rgb_alpha().convert("RGBa"), on_white(PREMULTIPLIED[:, :, :3], ALPHA[:, :, None])),
    "CMYK": (Image.fromarray(RGB).convert("CMYK"), RGB),
    "YCbCr": (Image.fromarray(RGB).convert("YCbCr"), RGB),
    "HSV": (Image.fromarray(RGB).convert("HSV"), RGB),
    "LAB": (Image.fromarray(smooth()).convert("LAB"), smooth()),
    "I;16": (Image.fromarray(WIDE), WIDE_RGB),
    "I;16B": (Image.frombytes("I;16B", WIDE.shape[::-1], WIDE.astype(">u2").tobytes()), WIDE_RGB),
    "I": (Image.fromarray(WIDE.astype(np.int32)), WIDE_RGB),
    "F": (Image.fromarray(GREY.astype(np.float32) + 0.25), GREY_RGB),
}
#: The trip to these modes and back is lossy by itself: equal to Pillow, and close to the picture.
LOSSY = ("YCbCr", "HSV", "LAB")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode(mode: str) -> None:
    image, expected = MODES[mode]
    assert image.mode == mode.split(",")[0]
    if mode == "La":
        assert_image(load_image(image), load_image(image.convert("LA")))
    elif mode in LOSSY:
        assert_image(load_image(image), np.array(image.convert("RGB")))
        # In sample units; 8 bits are coarse in other colour spaces. Measured: 1.3, 0.6 and 0.9.
        assert abs(load_image(image).astype(int) - expected).mean() < 3
        assert abs(load_image(image).astype(int) - expected[::-1]).mean() > 30
    else:
        assert_image(load_image(image), expected)


def test_the_given_image_is_not_changed() -> None:
    image = rgb_alpha()
    before = image.tobytes()
    load_image(image)
    assert (image.mode, image.tobytes()) == ("RGBA", before)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_alpha_in_files(form: str) -> None:
    expected = on_white(RGB, ALPHA[:, :, None])
    assert_image(load_image(encoded(rgb_alpha(), form, lossless=True, exact=True)), expected)


def test_transparent_colour_in_png() -> None:
    """tRNS of an RGB picture: one colour is see-through."""
    colour = tuple(int(v) for v in RGB[0, 0])
    expected = RGB.copy()
    expected[(colour == RGB).all(axis=2)] = 255
    assert_image(load_image(encoded(RGB, transparency=colour)), expected)


def test_sixteen_bit_png() -> None:
    assert_image(load_image(encoded(Image.fromarray(WIDE))), WIDE_RGB)


def test_cmyk_jpeg_is_not_inverted() -> None:
    data = encoded(Image.fromarray(smooth()).convert("CMYK"), "JPEG", quality=95)
    assert abs(load_image(data).astype(int) - smooth()).mean() < 4  # JPEG at quality 95, in sample units


def test_float_limits() -> None:
    grey_HW = np.array([[-5.0, 0.5, 1.5, 254.6, 300.0]], dtype=np.float32)
    assert load_image(Image.fromarray(grey_HW))[0, :, 0].tolist() == [0, 0, 2, 255, 255]
    grey_HW[0, 0] = np.nan
    assert code_of(Image.fromarray(grey_HW)) == "image.array"


# ---- which way up ----

UPRIGHT: dict[int, Any] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[::-1].transpose(1, 0, 2),  # stored lying on its left side: turn clockwise
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_orientation_is_applied(orientation: int, form: str) -> None:
    data = encoded(RGB, form, exif=exif(orientation), lossless=True)
    expected = np.ascontiguousarray(UPRIGHT[orientation](RGB))
    assert_image(load_image(data), expected)
    assert_image(load_image(Image.open(io.BytesIO(data))), expected)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation_of_jpeg(orientation: int) -> None:
    plain = load_image(encoded(smooth(), "JPEG"))
    turned = load_image(encoded(smooth(), "JPEG", exif=exif(orientation)))
    assert_image(turned, np.ascontiguousarray(UPRIGHT[orientation](plain)))


@pytest.mark.parametrize(
    ("kind", "count", "value"),
    [
        (3, 1, b"\0\0"),
        (3, 1, b"\x09\0"),
        (3, 1, b"\xff\xff"),
        (3, 0, b"\x06\0"),
        (2, 2, b"6\0"),  # text
        (11, 1, struct.pack("<f", 6.0)),  # a float
        (99, 1, b"\x06\0"),  # no such type
    ],
)
def test_nonsense_orientation_is_ignored(kind: int, count: int, value: bytes) -> None:
    entry = struct.pack("<HHI", 0x0112, kind, count) + value.ljust(4, b"\0")
    block = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + bytes(4)
    assert_image(load_image(encoded(RGB, exif=block)), RGB)


@pytest.mark.parametrize(
    "block",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0\x08\0\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(20),
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0\xff\xff\xff\xff" * 30,
        b"Exif\0\0XX" + bytes(64),
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abc\0\0\0\0\x08",
    ],
)
def test_damaged_exif_is_ignored(block: bytes) -> None:
    plain = encoded(smooth(), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
    assert_image(load_image(plain[:2] + segment + plain[2:]), load_image(plain))


# ---- manners ----


def test_importing_loads_neither_pillow_nor_numpy() -> None:
    program = (
        "import sys, edgevlm.image, edgevlm.kernels, edgevlm.preprocess\n"
        "print(sorted({'PIL', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
