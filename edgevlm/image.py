"""Any picture a caller may hand in, as `image_HWC`: uint8 RGB, upright, without alpha, within limits.

The gate for hostile files. Its order is fixed, cheapest first: size of the file, magic bytes, header by the one Pillow
plugin that the magic bytes name, sides and aspect ratio, and only then pixels. Whatever the decoder does with a bad
file, one of our errors comes out. This is the only file that imports Pillow, but for `bench.py`, which times it.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

from edgevlm import frames
from edgevlm._arrays import check_image
from edgevlm.errors import EdgeVLMError, ImageError
from edgevlm.files import open_regular

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    ImageSource = str | os.PathLike[str] | bytes | Image | NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What is refused before any pixel is decoded.

    2^26 pixels let the full pictures of 64-megapixel phones pass (9280 x 6944) and bound memory: a pixel of an RGB file
    takes 4 bytes, 8 while it is turned; of other modes up to 20 while they are converted.
    """

    encoded_bytes: int = 64 * 2**20
    side_px: int = 16384
    pixels: int = 2**26
    aspect: int = 200


DEFAULT_LIMITS = ImageLimits()

#: Accepted formats: first bytes, our name, the Pillow plugins that may look at the file. MPO is a JPEG with a second
#: picture behind it, as some phones write it.
_ACCEPTED = (
    (b"\xff\xd8\xff", "JPEG", ("JPEG", "MPO")),
    (b"\x89PNG\r\n\x1a\n", "PNG", ("PNG",)),
    (b"RIFF????WEBP", "WebP", ("WEBP",)),
)

#: Formats that people try, so that the message can name them. `?` stands for any byte, here and above.
_REFUSED = (
    (b"GIF8", "a GIF"),
    (b"BM", "a BMP"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"????ftypavi", "an AVIF"),
    (b"????ftyphe", "a HEIC"),
    (b"????ftypmif1", "a HEIC"),
    (b"????ftyp", "an MP4 or QuickTime"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL"),
    (b"\xff\x0a", "a JPEG XL"),
    (b"8BPS", "a Photoshop"),
    (b"\0\0\1\0", "an ICO"),
    (b"%PDF", "a PDF"),
    (b"%!PS", "a PostScript"),
    (b"SIMPLE  =", "a FITS"),
    (b"<svg", "an SVG"),
    (b"<?xml", "an XML or SVG"),
    (b"RIFF????AVI ", "an AVI"),
    (b"RIFF????WAVE", "a WAV"),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM"),
)

#: `warnings.catch_warnings` changes state of the whole process, so decoding takes turns.
_warnings_lock = threading.Lock()


def load_image(
    source: ImageSource, *, limits: ImageLimits = DEFAULT_LIMITS, name: str = "the picture"
) -> NDArray[np.uint8]:
    """Load a picture.

    EXIF orientation is applied, transparency is composited on white, of an animation the first frame is taken. Pixels
    are those of Pillow's decoder; `docs/images.md` says what happens to each mode.

    Args:
        source: A path; the bytes of a JPEG, PNG or WebP file; a PIL image of any mode; or a uint8 array (H, W) or
            (H, W, C) with 1 (grey), 3 (RGB) or 4 (RGBA) channels.
        limits: What to refuse.
        name: What messages call a picture that is not a path.

    Returns:
        `image_HWC`: uint8 RGB, (H, W, 3). It may be read-only, its pixels may be four bytes apart, as Pillow's decoder
        leaves them (`edgevlm.kernels` take them so; `numpy.ascontiguousarray` packs them), and a packed RGB array is
        returned as it is.

    Raises:
        FileError: `file.not_found`, `file.not_regular` or `file.unreadable`.
        ImageError: Any code `image.*`; see `edgevlm.errors.CODES`.

    Example:
        >>> import numpy as np
        >>> load_image(np.full((2, 3), 7, dtype=np.uint8)).shape
        (2, 3, 3)
    """
    import numpy as np
    from PIL import Image

    if isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
        return _decode(*read_image(source, limits=limits, name=name), limits)
    if isinstance(source, np.ndarray):
        return _from_array(source, limits)
    if isinstance(source, Image.Image):
        _check_size(source.width, source.height, name, limits)
        with _decoder_errors(name):
            return _to_array(source)
    raise ImageError(
        f"a path, bytes, a PIL image or a uint8 array is needed, found {type(source).__name__}", code="image.array"
    )


def read_image(
    source: str | os.PathLike[str] | bytes | bytearray | memoryview,
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
    name: str = "the picture",
) -> tuple[bytes, str]:
    """The content of an encoded picture, and what messages call it: its path, if it has one, or else `name`.

    Raises:
        FileError, ImageError: as `load_image`, as far as reading goes.
    """
    if isinstance(source, (str, os.PathLike)):
        name = f"`{os.fspath(source)}`"
        return _read_file(source, name, limits), name
    return bytes(source), name


def _read_file(path: str | os.PathLike[str], name: str, limits: ImageLimits) -> bytes:
    """All bytes of a regular file; never waits for a pipe or a device.

    Raises:
        FileError: It is missing, not a regular file, or the system refuses.
        ImageError: `image.too_many_bytes`.
    """
    with open_regular(path) as (file, size):
        # One byte more than allowed: the file may be growing.
        data = b"" if size > limits.encoded_bytes else file.read(limits.encoded_bytes + 1)
    if size > limits.encoded_bytes or len(data) > limits.encoded_bytes:
        raise _too_many_bytes(name, limits)
    return data


def _decode(data: bytes, name: str, limits: ImageLimits) -> NDArray[np.uint8]:
    """The picture in an encoded file."""
    from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin  # noqa: F401 - or open() loads all plugins

    if len(data) > limits.encoded_bytes:
        raise _too_many_bytes(name, limits)
    form, plugins = _sniff(data, name)
    with _decoder_errors(name, cut=_is_cut(data, form)), Image.open(BytesIO(data), formats=plugins) as image:
        _check_size(image.width, image.height, name, limits)
        return _load_in_place(image)


def _sniff(data: bytes, name: str) -> tuple[str, tuple[str, ...]]:
    """Format and plugins, from the first bytes.

    Raises:
        ImageError: `image.format` for another known format, `image.undecodable` for anything else.
    """
    for magic, form, plugins in _ACCEPTED:
        if _matches(data, magic):
            return form, plugins
    for magic, form in _REFUSED:
        if _matches(data, magic):
            raise ImageError(
                f"{name} is {form} file; JPEG, PNG and WebP are accepted, convert it to one of them",
                code="image.format",
            )
    found = "empty" if not data else "not a picture in a known format"
    raise ImageError(f"{name} is {found}; JPEG, PNG and WebP are accepted", code="image.undecodable")


def _matches(data: bytes, magic: bytes) -> bool:
    return len(data) >= len(magic) and all(m in (ord("?"), d) for m, d in zip(magic, data, strict=False))


def _is_cut(data: bytes, form: str) -> bool:
    """Whether a file that failed to decode lacks its end. Only chooses the error, so trailing junk may mislead it."""
    if form == "JPEG":
        return not data.rstrip(b"\0").endswith(b"\xff\xd9")  # end of image
    if form == "PNG":
        return b"IEND" not in data[-64:]
    return len(data) < 8 + int.from_bytes(data[4:8], "little")  # RIFF: size of what follows


def _check_size(width: int, height: int, name: str, limits: ImageLimits) -> None:
    """Refuse by sides, pixels and aspect ratio.

    Raises:
        ImageError: `image.too_many_pixels`, `image.aspect`, or `image.undecodable` for an empty picture.
    """
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width} x {height} pixels; at least 1 x 1 is needed", code="image.undecodable")
    if max(width, height) > limits.side_px or width * height > limits.pixels:
        raise ImageError(
            f"{name} is {width} x {height} pixels; at most {limits.side_px} on a side and {limits.pixels} in all are "
            "accepted, make it smaller",
            code="image.too_many_pixels",
        )
    if max(width, height) > limits.aspect * min(width, height):
        raise ImageError(
            f"{name} is {width} x {height} pixels; at most {limits.aspect} times as long as wide is accepted, cut it",
            code="image.aspect",
        )


def _too_many_bytes(name: str, limits: ImageLimits) -> ImageError:
    return ImageError(
        f"{name} is larger than {limits.encoded_bytes} bytes; make the picture smaller", code="image.too_many_bytes"
    )


@contextmanager
def _decoder_errors(name: str, *, cut: bool = False) -> Iterator[None]:
    """Run Pillow without warnings, and make one of our errors of whatever it raises.

    Pillow's plugins are known to raise OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError,
    OverflowError, MemoryError, struct.error and zlib.error on bad files; a list would never be complete.
    """
    from PIL import UnidentifiedImageError
    from PIL.Image import DecompressionBombError

    try:
        with _warnings_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except EdgeVLMError:
        raise
    except DecompressionBombError as error:  # twice Pillow's own limit, raised before ours is asked
        raise ImageError(f"{name} has too many pixels ({error})", code="image.too_many_pixels") from error
    except Exception as error:
        if cut:
            raise ImageError(
                f"{name} ends before its data is complete; copy or download it again", code="image.truncated"
            ) from error
        detail = "" if isinstance(error, UnidentifiedImageError) else f" ({error or type(error).__name__})"
        raise ImageError(
            f"{name} cannot be decoded{detail}; check that it opens in a picture viewer", code="image.undecodable"
        ) from error


def _from_array(array: NDArray[Any], limits: ImageLimits) -> NDArray[np.uint8]:
    """An array as RGB; grey is repeated, RGBA composited on white.

    Raises:
        ImageError: `image.array`, or by size.
    """
    import numpy as np

    image_HWC = array[:, :, None] if array.ndim == 2 else array
    if array.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] not in (1, 3, 4):
        raise ImageError(
            f"a uint8 array (H, W) or (H, W, C) with C = 1, 3 or 4 is needed, found {array.dtype} {array.shape}",
            code="image.array",
        )
    height, width, channels = image_HWC.shape
    _check_size(width, height, "the array", limits)
    if channels == 4:
        return frames.composite(image_HWC)
    return check_image(np.broadcast_to(image_HWC, (height, width, 3)), spaced=True)


def _load_in_place(image: Image) -> NDArray[np.uint8]:
    """A PIL image that is not loaded yet, as upright RGB; without a copy if it is RGB already.

    Pillow stores RGB in four bytes for each pixel, and `numpy.asarray` packs them in as much time as decoding takes. So
    its decoder is given an array of ours to write to.
    """
    import numpy as np
    from PIL import Image as pil
    from PIL.ImageFile import ImageFile

    if image.mode != "RGB" or not isinstance(image, ImageFile):
        return _to_array(image)
    # Zeros, as Pillow's own memory: a decoder may leave pixels out.
    rgbx_HWC = np.zeros((image.height, image.width, 4), dtype=np.uint8)
    try:
        mapped = pil.core.map_buffer(rgbx_HWC, image.size, "raw", 0, ("RGB", 0, 1))  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError):  # it is not public: it may change or go away
        return _to_array(image)
    prepare = image.load_prepare

    def load_prepare() -> None:
        # Not before: an image that has memory counts as decoded, even if its file holds no pixels at all.
        image.im = mapped
        prepare()

    image.load_prepare = load_prepare  # type: ignore[method-assign]
    try:
        image.load()
    finally:
        del image.load_prepare  # or picture and function hold each other, and the pixels wait for the garbage collector
    if image.im is not mapped or image.has_transparency_data:  # a plugin of its own mind; a transparent colour
        return _to_array(image)
    return _upright(rgbx_HWC, _orientation(image))[:, :, :3]


def _to_array(image: Image) -> NDArray[np.uint8]:
    """A PIL image of any mode as upright RGB. Loads its pixels if that has not happened."""
    import numpy as np

    image.load()
    converted = _to_rgb_or_rgba(image)
    four = converted if converted.mode == "RGBA" else converted.convert("RGBX")  # which numpy takes as it is
    upright_HWC = _upright(np.asarray(four), _orientation(image))
    return frames.composite(upright_HWC) if four.mode == "RGBA" else upright_HWC[:, :, :3]


def _to_rgb_or_rgba(image: Image) -> Image:
    """Any mode as RGB, or as RGBA if it has transparency.

    Samples wider than 8 bits keep their high byte: "I;16" and its variants, and "I", which is how 16-bit greys of some
    formats arrive. "F" is taken as 0..255, rounded and limited.
    """
    import numpy as np
    from PIL import Image as pil

    if image.mode.startswith("I"):
        grey_HW = np.clip(np.asarray(image), 0, 65535) >> 8
        return pil.fromarray(grey_HW.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        grey_HW = np.asarray(image)
        if not np.isfinite(grey_HW).all():
            raise ImageError("the picture has samples that are not finite numbers; replace them", code="image.array")
        return pil.fromarray(np.clip(np.rint(grey_HW), 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        straight = image.convert("LA") if image.mode == "La" else image  # Pillow knows no direct way
        return straight.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image) -> int:
    """EXIF orientation, 1 to 8. Nonsense counts as 1, upright: metadata must not make a picture unusable."""
    try:
        value = image.getexif().get(0x0112)
    except Exception:  # a damaged directory; the pixels are decoded already
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(pixels_HWC: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undo how the camera was held (EXIF 2.32, tag 0x0112), for pixels of four bytes.

    Block by block: rows become columns inside the cache, a third of the time that Pillow or a plain copy takes.
    """
    import numpy as np

    if orientation == 1:
        return pixels_HWC
    whole_HW = pixels_HWC.view(np.uint32)[:, :, 0]
    turned_HW = {
        2: whole_HW[:, ::-1],
        3: whole_HW[::-1, ::-1],
        4: whole_HW[::-1],
        5: whole_HW.T,
        6: whole_HW[::-1].T,
        7: whole_HW[::-1, ::-1].T,
        8: whole_HW[:, ::-1].T,
    }[orientation]
    upright_HW = np.empty(turned_HW.shape, dtype=np.uint32)
    height, width = turned_HW.shape
    for y in range(0, height, 64):
        for x in range(0, width, 64):
            upright_HW[y : y + 64, x : x + 64] = turned_HW[y : y + 64, x : x + 64]
    return upright_HW[:, :, None].view(np.uint8)
