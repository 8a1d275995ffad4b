"""Frames of a camera, in C: YUV to RGB, alpha over a colour, and how much two frames differ.

`yuv_to_rgb` is the standards' formula, rounded once; `composite` equals Pillow's `paste`; `mean_abs_diff` sums in whole
numbers. On every CPU the same comes out. The sources are `kernels/frames*.c`; formats, exactness and speed are in
`docs/camera.md`. The argument `target` is that of `edgevlm.kernels`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from edgevlm import _kernels
from edgevlm._arrays import check_image, translated_errors
from edgevlm.errors import ImageError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Layout = Literal["yuyv", "nv12", "i420"]
    Matrix = Literal["bt601", "bt709"]


def yuv_to_rgb(
    frame: bytes | bytearray | memoryview | NDArray[np.uint8],
    height: int,
    width: int,
    layout: Layout,
    *,
    matrix: Matrix = "bt601",
    full_range: bool = False,
    stride: int | None = None,
    target: str | None = None,
) -> NDArray[np.uint8]:
    """Convert a camera's frame to RGB.

    Each sample is the formula of ITU-R BT.601-7 or BT.709-6 in real numbers, rounded to the nearest integer (ties up)
    and clipped, without any error, for every (Y, U, V). Pixels that share a chroma sample get that sample: no
    interpolation, as in OpenCV and libyuv. The layouts are those of V4L2, picamera2 and OpenCV:

        yuyv  Y0 U0 Y1 V0 Y2 U1 ...: rows of ceil(W / 2) * 4 bytes
        nv12  H rows of Y, then ceil(H / 2) rows of U0 V0 U1 V1 ...
        i420  H rows of Y, then ceil(H / 2) rows of U, then as many of V

    Args:
        frame: The frame in one block: any buffer of bytes, or a uint8 array of any shape and strides, which is read in
            C order. Exactly as long as the layout, the height and the stride say, padding of the last row included.
        height: Rows of luma, at least 1; may be odd.
        width: Pixels of a row, at least 1; may be odd.
        layout: "yuyv", "nv12" or "i420".
        matrix: "bt601" (JPEG, webcams, standard definition) or "bt709" (high definition).
        full_range: Whether samples go from 0 to 255 (JPEG, many webcams) and not from 16 to 235 and 240.
        stride: Bytes from one luma row to the next, V4L2's `bytesperline`; default: rows are packed. A chroma row of
            "nv12" has as many bytes, of "i420" half as many, both rounded up.
        target: A name from `kernels.targets()`; default: the active target.

    Returns:
        `image_HWC`: uint8, (height, width, 3), C-contiguous.

    Raises:
        ImageError: `image.array`, `frame` is neither a buffer of bytes nor a uint8 array.
        UsageError: A size, stride or name is out of range, or the frame is not as long as they say.
        KernelError: The target does not exist, or this CPU cannot run it.

    Example:
        >>> yuv_to_rgb(bytes([235, 128, 16, 128]), 1, 2, "yuyv")  # white and black, in video range
        array([[[255, 255, 255],
                [  0,   0,   0]]], dtype=uint8)
    """
    import numpy as np

    block = _frame_block(frame)
    try:
        rows, columns = operator.index(height), operator.index(width)
        row_bytes = None if stride is None else operator.index(stride)
    except TypeError as error:
        raise UsageError(
            f"a frame of height {height!r}, width {width!r}, stride {stride!r}: sizes are whole numbers"
        ) from error
    if row_bytes == 0:
        raise UsageError("stride=0: pass the bytes from one row to the next, or nothing if rows are packed")
    with translated_errors():
        needed = _kernels.yuv_size(str(layout), rows, columns, row_bytes or 0)
        if block.size != needed:
            padding = "" if row_bytes is None else f" and stride {row_bytes}"
            raise UsageError(
                f"a {layout} frame of {columns} x {rows} pixels{padding} has {needed} bytes, found {block.size}; "
                "check layout, size and stride, and cut off what follows the last row"
            )
        out_HWC = np.empty((rows, columns, 3), dtype=np.uint8)
        _kernels.yuv_to_rgb(block, out_HWC, str(layout), str(matrix), bool(full_range), row_bytes or 0, target)
    return out_HWC


def composite(
    image_HWC: NDArray[np.uint8],
    background_rgb: Sequence[int] = (255, 255, 255),
    target: str | None = None,
) -> NDArray[np.uint8]:
    """Put an RGBA picture on a ground of one colour.

    Each sample is `(colour * alpha + background * (255 - alpha)) / 255`, rounded to nearest. That equals Pillow's
    `Image.paste(rgba, mask=rgba)` on an RGB picture of the background, bit for bit.

    Args:
        image_HWC: uint8, (H, W, 4), alpha last and not premultiplied; any strides. Sides up to 2^24.
        background_rgb: Three whole numbers from 0 to 255.
        target: A name from `kernels.targets()`; default: the active target.

    Returns:
        uint8, (H, W, 3), C-contiguous.

    Raises:
        ImageError: `image.array`, `image_HWC` is not such a picture.
        UsageError: `background_rgb` is out of range.
        KernelError: The target does not exist, or this CPU cannot run it.

    Example:
        >>> import numpy as np
        >>> half_red_HWC = np.array([[[255, 0, 0, 128]]], dtype=np.uint8)
        >>> composite(half_red_HWC)
        array([[[255, 127, 127]]], dtype=uint8)
    """
    import numpy as np

    source_HWC = check_image(image_HWC)
    height, width, channels = source_HWC.shape
    if channels != 4:
        raise ImageError(f"composite needs 4 channels, RGBA, found {channels}", code="image.array")
    try:
        red, green, blue = map(operator.index, background_rgb)
    except (TypeError, ValueError) as error:
        raise UsageError(f"background {background_rgb!r}: three whole numbers from 0 to 255 are needed") from error
    if not all(0 <= sample <= 255 for sample in (red, green, blue)):
        raise UsageError(f"background {background_rgb!r}: three whole numbers from 0 to 255 are needed")
    with translated_errors():
        out_HWC = np.empty((height, width, 3), dtype=np.uint8)
        _kernels.composite(source_HWC, out_HWC, (red, green, blue), target)
    return out_HWC


def mean_abs_diff(a_HWC: NDArray[np.uint8], b_HWC: NDArray[np.uint8], target: str | None = None) -> float:
    """How much two frames differ: the mean of `|a - b|` over all samples, for example to skip a frame that repeats.

    The sum is exact; only the division rounds, to the nearest float.

    Args:
        a_HWC: uint8, (H, W) or (H, W, C) with C = 1, 3 or 4; any strides. A frame in "nv12" or "i420" can be compared
            as it is, as (H * 3 / 2, W).
        b_HWC: The same shape.
        target: A name from `kernels.targets()`; default: the active target.

    Returns:
        From 0.0 (equal) to 255.0 (black against white).

    Raises:
        ImageError: `image.array`, `a_HWC` or `b_HWC` is not such a picture.
        UsageError: The shapes differ.
        KernelError: The target does not exist, or this CPU cannot run it.

    Example:
        >>> import numpy as np
        >>> mean_abs_diff(np.array([[0, 10]], np.uint8), np.array([[3, 10]], np.uint8))
        1.5
    """
    first_HWC, second_HWC = check_image(a_HWC), check_image(b_HWC)
    if a_HWC.shape != b_HWC.shape:
        raise UsageError(f"frames of one shape are needed, found {a_HWC.shape} and {b_HWC.shape}")
    with translated_errors():
        return _kernels.sum_abs_diff(first_HWC, second_HWC, target) / first_HWC.size


def _frame_block(frame: Any) -> NDArray[np.uint8]:
    """All bytes of a frame as one row of uint8; a copy only of an array that is not C-contiguous.

    Raises:
        ImageError: `image.array`.
    """
    import numpy as np

    if isinstance(frame, np.ndarray):
        if frame.dtype == np.uint8:
            return np.ascontiguousarray(frame).reshape(-1)
        found = f"an array of {frame.dtype}"
    else:
        found = type(frame).__name__
        try:
            view = memoryview(frame)
        except (TypeError, ValueError, BufferError):  # not a buffer, or a closed one
            pass
        else:
            if view.format == "B" and view.c_contiguous:
                return np.frombuffer(view, dtype=np.uint8)
            found = f"a buffer of '{view.format}'"
    raise ImageError(f"the frame must be a buffer of bytes or a uint8 array, found {found}", code="image.array")
