"""Image kernels: exact resize and normalization of uint8 pictures, in C.

`resize` equals Pillow 13's `Image.resize` bit for bit, on every target; `normalize` is a table look-up and therefore
equals whatever reference the table was made from. What runs depends on the CPU, what comes out does not. The sources
are in `kernels/`; how to add a SIMD target is in `docs/images.md`.

`EDGEVLM_KERNELS=<name>` chooses the target of a process, at the first use; the argument `target` chooses it for one
call, so that tests can compare targets.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edgevlm import _kernels
from edgevlm.errors import ImageError, KernelError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgevlm.spec import Resample


def targets() -> list[str]:
    """Names of the SIMD targets that this CPU can run, slowest first; `"scalar"` is always among them."""
    return list(_kernels.targets())


def active_target() -> str:
    """Name of the target that runs when a call asks for none: `EDGEVLM_KERNELS`, or else the fastest.

    Raises:
        KernelError: `EDGEVLM_KERNELS` names a target that does not exist or that this CPU cannot run.
    """
    with _translated_errors():
        return str(_kernels.active())


def resize(
    image_HWC: NDArray[np.uint8],
    height: int,
    width: int,
    resample: Resample = "bicubic",
    box: Sequence[float] | None = None,
    target: str | None = None,
    *,
    window: Sequence[int] | None = None,
) -> NDArray[np.uint8]:
    """Resample a picture to `height` x `width`, with antialiasing.

    Equal to `PIL.Image.Image.resize((width, height), resample, box)` of Pillow 13 to the last bit, for any size. All
    channels are treated alike: four channels equal Pillow's on "RGBX" or "CMYK", not on "RGBA", which Pillow
    multiplies by its alpha first.

    Args:
        image_HWC: uint8, (H, W) or (H, W, C) with C = 1, 3 or 4; any strides. Sides up to 2^24.
        height: Rows of the output, at least 1.
        width: Columns of the output, at least 1.
        resample: "box", "bilinear", "hamming", "bicubic" or "lanczos".
        box: Part of the source to use, (left, top, right, bottom) in pixels, fractions allowed; default: all of it.
        target: A name from `targets()`; default: the active target.
        window: Part of the output to compute, (top, left, rows, columns); default: all of it. The result is the slice
            `[top : top + rows, left : left + columns]` of what would come out without it, for less work.

    Returns:
        uint8, C-contiguous, with as many axes as `image_HWC`.

    Raises:
        ImageError: `image.array`, `image_HWC` is not such a picture.
        UsageError: A size, filter, box or window is out of range.
        KernelError: The target does not exist, or this CPU cannot run it.

    Example:
        >>> import numpy as np
        >>> edges_HWC = np.array([[0, 255, 0, 255]], dtype=np.uint8)
        >>> resize(edges_HWC, 1, 2, "box")
        array([[128, 128]], dtype=uint8)
    """
    import numpy as np

    source_HWC = _check_image(image_HWC)
    n_rows, n_columns, channels = source_HWC.shape
    try:
        size = (operator.index(height), operator.index(width))
        box_xyxy = (0.0, 0.0, float(n_columns), float(n_rows)) if box is None else tuple(map(float, box))
        top, left, rows, columns = (0, 0, *size) if window is None else tuple(map(operator.index, window))
        left_x, top_y, right_x, bottom_y = box_xyxy
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"resize to height {height!r}, width {width!r}, box {box!r}, window {window!r}: "
            "sizes are whole numbers, a box and a window have four numbers"
        ) from error
    if not all(1 <= side <= _kernels.MAX_SIDE for side in (*size, rows, columns)):
        raise UsageError(
            f"resize to height {size[0]}, width {size[1]}, window {window}: sides go from 1 to {_kernels.MAX_SIDE}"
        )
    with _translated_errors():
        out_HWC = np.empty((rows, columns, channels), dtype=np.uint8)
        box_ltrb = (left_x, top_y, right_x, bottom_y)
        _kernels.resize(source_HWC, out_HWC, str(resample), size, box_ltrb, (top, left), target)
    return out_HWC if image_HWC.ndim == 3 else out_HWC[:, :, 0]


def normalize(
    image_HWC: NDArray[np.uint8],
    lut_C256: NDArray[np.float32],
    out_CHW: NDArray[np.float32] | None = None,
    target: str | None = None,
) -> NDArray[np.float32]:
    """Look every sample up in its channel's table: `out_CHW[c, y, x] = lut_C256[c, image_HWC[y, x, c]]`.

    Args:
        image_HWC: uint8, (H, W, 3); any strides.
        lut_C256: float32, (3, 256).
        out_CHW: float32, (3, H, W), C-contiguous and writable: where the result goes, for example one tile of a batch.
            Default: a new array.
        target: A name from `targets()`; default: the active target.

    Returns:
        `out_CHW`.

    Raises:
        ImageError: `image.array`, `image_HWC` is not such a picture.
        UsageError: `lut_C256` or `out_CHW` has another shape or type.
        KernelError: The target does not exist, or this CPU cannot run it.
    """
    import numpy as np

    source_HWC = _check_image(image_HWC)
    height, width, channels = source_HWC.shape
    if channels != 3:
        raise ImageError(f"normalize needs 3 channels, found {channels}; convert to RGB", code="image.array")
    lut_C256 = np.asarray(lut_C256)
    if lut_C256.dtype != np.float32 or lut_C256.shape != (3, 256):
        raise UsageError(f"the table must be float32 (3, 256), found {lut_C256.dtype} {lut_C256.shape}")
    if out_CHW is None:
        out_CHW = np.empty((3, height, width), dtype=np.float32)
    elif not (
        isinstance(out_CHW, np.ndarray)
        and out_CHW.dtype == np.float32
        and out_CHW.shape == (3, height, width)
        and out_CHW.flags.c_contiguous
        and out_CHW.flags.writeable
    ):
        raise UsageError(f"out_CHW must be a writable, C-contiguous float32 (3, {height}, {width})")
    with _translated_errors():
        _kernels.normalize(source_HWC, np.ascontiguousarray(lut_C256), out_CHW, target)
    return out_CHW


def _check_image(image_HWC: Any) -> NDArray[np.uint8]:
    """A (H, W, C) view of a picture whose pixels are packed inside each row; a copy only if they are not.

    Raises:
        ImageError: `image.array`.
    """
    import numpy as np

    if not isinstance(image_HWC, np.ndarray):
        raise ImageError(
            f"a uint8 array (H, W) or (H, W, C) is needed, found {type(image_HWC).__name__}", code="image.array"
        )
    if image_HWC.dtype != np.uint8:
        raise ImageError(
            f"a uint8 array is needed, found {image_HWC.dtype}; convert it, for example with "
            "`.round().clip(0, 255).astype('uint8')`",
            code="image.array",
        )
    view_HWC = image_HWC[:, :, None] if image_HWC.ndim == 2 else image_HWC
    if view_HWC.ndim != 3 or view_HWC.shape[2] not in (1, 3, 4) or 0 in view_HWC.shape:
        raise ImageError(
            f"an array (H, W) or (H, W, C) with C = 1, 3 or 4 is needed, found the shape {image_HWC.shape}",
            code="image.array",
        )
    _, width, channels = view_HWC.shape
    row, pixel, sample = view_HWC.strides
    packed = sample == 1 and pixel == channels and row >= width * channels
    return view_HWC if packed else np.ascontiguousarray(view_HWC)


@contextmanager
def _translated_errors() -> Iterator[None]:
    """The C side's exceptions as ours; the sentences are the same."""
    try:
        yield
    except _kernels.UnknownTarget as error:
        raise KernelError(str(error), code="kernels.unknown_target") from error
    except _kernels.UnsupportedTarget as error:
        raise KernelError(str(error), code="kernels.unsupported_target") from error
    except (ValueError, OverflowError) as error:
        raise UsageError(str(error)) from error
