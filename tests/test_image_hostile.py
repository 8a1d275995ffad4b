"""Loading pictures that were made to hurt: other formats, damaged files, bombs, and paths that are not files."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import assert_image, code_of, encoded, exif, noise, png_chunk, png_of_zeros
from PIL import Image, ImageFile

from edgevlm.errors import EdgeVLMError, ImageError
from edgevlm.image import ImageLimits, load_image

# ---- other formats ----


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "ICO", "PDF", "JPEG2000", "AVIF", "EPS"])
def test_other_formats_are_refused_unseen(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(noise(64, 64), form)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("a plugin was asked"))
    assert code_of(data) == "image.format"


@pytest.mark.parametrize(
    "data",
    [b"RIFF\x24\0\0\0WAVEfmt ", b"\0\0\0\x18ftypmp42", b"\0\0\0\x18ftypheic", b"\x1aE\xdf\xa3webm", b"<svg xmlns=''/>"],
)
def test_other_media_are_refused(data: bytes) -> None:
    assert code_of(data) == "image.format"


def test_format_message_helps() -> None:
    with pytest.raises(ImageError, match="the picture is a GIF file; JPEG, PNG and WebP are accepted"):
        load_image(encoded(noise(), "GIF"))


@pytest.mark.parametrize("chunks", [b"", b"acTL"])
def test_a_png_without_pixels_is_refused(chunks: bytes) -> None:
    """Even one in RGB, for whose pixels there is memory before the file is asked for them."""
    data = encoded(noise(), "PNG")
    animation = png_chunk(chunks, struct.pack(">II", 1, 0)) if chunks else b""
    hollow = data[:33] + animation + png_chunk(b"IEND", b"")  # signature and IHDR have 33 bytes
    assert code_of(hollow) == "image.undecodable"
    assert load_image(data).any()


def test_the_bytes_count_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(encoded(noise(), "PNG"))
    assert_image(load_image(path), noise())
    path.write_bytes(encoded(noise(), "GIF"))
    assert code_of(path) == "image.format"


# ---- damaged files ----


@pytest.mark.parametrize("data", [b"", b"\0", b"hello, world", b"\xef\xbb\xbf\xff\xd8\xff", bytes(1000)])
def test_what_is_not_a_picture(data: bytes) -> None:
    assert code_of(data) == "image.undecodable"


SEEDS = {
    "PNG": encoded(noise(80, 100)),
    "JPEG": encoded(noise(80, 100), "JPEG", exif=exif(6)),
    "progressive": encoded(noise(80, 100), "JPEG", progressive=True),
    "WEBP": encoded(noise(80, 100), "WEBP", lossless=True, exif=exif(6)),
    "palette": encoded(Image.fromarray(noise(channels=1)[:, :, 0]).convert("P"), transparency=3),
    "LA": encoded(Image.fromarray(noise(channels=1)[:, :, 0]).convert("LA")),
}


@pytest.mark.parametrize("seed", SEEDS)
def test_truncated_anywhere(seed: str) -> None:
    """At 64 places, from the magic bytes to where only the end mark and a few bytes are missing."""
    data = SEEDS[seed]
    for length in np.linspace(12, len(data) - 40, 64).astype(int):
        assert code_of(data[:length]) == "image.truncated"


@pytest.mark.parametrize("seed", SEEDS)
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_damage_gives_a_picture_or_our_error(seed: str, data: st.DataObject) -> None:
    mutated = bytearray(SEEDS[seed])
    for _ in range(data.draw(st.integers(1, 8))):
        mutated[data.draw(st.integers(0, min(len(mutated) - 1, 700)))] = data.draw(st.integers(0, 255))
    try:
        found = load_image(bytes(mutated))
    except ImageError:
        return
    assert found.ndim == 3
    assert found.shape[2] == 3


@pytest.mark.parametrize("raised", [MemoryError(), SyntaxError("x"), struct.error("x"), zlib.error("x"), KeyError("x")])
def test_whatever_the_decoder_raises_becomes_ours(raised: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: Any) -> None:
        raise raised

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert code_of(SEEDS["PNG"]) == "image.undecodable"


# ---- limits ----


@pytest.mark.parametrize(("height", "width"), [(20000, 20000), (9000, 9000), (16385, 100), (100, 16385), (8193, 8193)])
def test_too_many_pixels(height: int, width: int) -> None:
    """Above Pillow's error limit, between its warning and error limits, and below both."""
    assert code_of(png_of_zeros(height, width)) == "image.too_many_pixels"


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """In a process of its own, so that its peak memory is the bomb's. Decoded it would take 400 MB and more."""
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of_zeros(20000, 20000))
    program = (
        "import resource, sys, time\n"
        "from edgevlm.errors import ImageError\n"
        "from edgevlm.image import load_image\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB\n"
        "try: load_image(sys.argv[2])\n"
        "except ImageError: pass\n"
        "before, start = peak(), time.process_time()\n"
        "try: load_image(sys.argv[1])\n"
        "except ImageError as error: print(error.code, peak() - before, time.process_time() - start)\n"
    )
    small = tmp_path / "small.png"
    small.write_bytes(SEEDS["PNG"][:200])
    command = [sys.executable, "-c", program, str(path), str(small)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    code, grown_kib, seconds = done.stdout.split()
    assert code == "image.too_many_pixels"
    assert int(grown_kib) < 8 * 1024
    assert float(seconds) < 1
    assert done.stderr == ""


def test_pictures_of_large_phone_sensors_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 megapixels pass the gate; they are not decoded here, which would take seconds."""
    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image.size) or 1 / 0)
    assert code_of(png_of_zeros(6944, 9280)) == "image.undecodable"
    assert decoded == [(9280, 6944)]


@pytest.mark.parametrize("limits", [{"pixels": 600}, {"side_px": 30}, {"aspect": 2}])
def test_limits_are_inclusive(limits: dict[str, int]) -> None:
    assert load_image(png_of_zeros(20, 30), limits=ImageLimits(**limits)).shape == (20, 30, 3)
    name, value = next(iter(limits.items()))
    assert code_of(png_of_zeros(20, 30), limits=ImageLimits(**{name: value - 1})).startswith("image.")


@pytest.mark.parametrize(("height", "width"), [(1, 201), (201, 1), (3000, 1), (44, 9000)])
def test_too_long_and_thin(height: int, width: int) -> None:
    assert code_of(png_of_zeros(height, width)) == "image.aspect"
    assert code_of(np.zeros((height, width), np.uint8)) == "image.aspect"
    assert code_of(Image.new("L", (width, height))) == "image.aspect"


@pytest.mark.parametrize(("height", "width"), [(0, 5), (5, 0), (2**31, 5), (5, 2**32 - 1)])
def test_impossible_sides(height: int, width: int) -> None:
    data = bytearray(png_of_zeros(5, 5))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    assert code_of(bytes(data)) in ("image.undecodable", "image.too_many_pixels")


def test_too_many_bytes(tmp_path: Path) -> None:
    data = SEEDS["PNG"]
    path = tmp_path / "large.png"
    path.write_bytes(data)
    limit = ImageLimits(encoded_bytes=len(data) - 1)
    assert code_of(data, limits=limit) == "image.too_many_bytes"
    assert code_of(path, limits=limit) == "image.too_many_bytes"
    assert load_image(path, limits=ImageLimits(encoded_bytes=len(data))).shape == (80, 100, 3)


def test_a_text_bomb_in_png_is_bounded() -> None:
    """100 MB of text in a compressed chunk: refused or skipped, never kept."""
    body = b"Comment\0\0" + zlib.compress(bytes(100_000_000), 9)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    plain = png_of_zeros(4, 4)
    assert code_of(plain[:33] + chunk + plain[33:]) == "image.undecodable"


# ---- paths ----


def test_missing_files(tmp_path: Path) -> None:
    for path in (tmp_path / "no.png", tmp_path / "no" / "no.png", "", "a\0b"):
        assert code_of(path) == "file.not_found"
    (tmp_path / "file").write_bytes(b"x")
    assert code_of(tmp_path / "file" / "below.png") == "file.not_found"


def test_things_that_are_not_files(tmp_path: Path) -> None:
    """None of them may be waited for: nobody writes into the pipe."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for path in (tmp_path, tmp_path / "pipe", tmp_path / "loop", tmp_path / "socket", "/dev/zero", "/dev/null"):
            assert code_of(path) == "file.not_regular"


def test_unreadable_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The refusal is played: the tests may run as a user who may read everything."""

    def refuse(*_: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    assert code_of(tmp_path / "secret.png") == "file.unreadable"


def test_messages_name_the_source(tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(SEEDS["PNG"][:500])
    for source, name in ((path, f"`{path}`"), (path.read_bytes(), "the picture")):
        with pytest.raises(EdgeVLMError) as caught:
            load_image(source)
        assert str(caught.value).startswith(name + " ends before")
