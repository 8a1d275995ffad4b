"""Image kernels: exact resize and normalization of uint8 pictures, in C.

`resize` equals Pillow 13's `Image.resize` bit for bit, on every target. `resize_tiles` is the same with a border before
and a canvas, tiles and a table look-up behind it, in one pass over the picture; the table equals whatever reference it
was made from. What runs depends on the CPU, what comes out does not. The sources are in `kernels/`; `docs/kernels.md`
says how they work, how fast they are, and how to add a SIMD target.

`EDGEVLM_KERNELS=<name>` chooses the target of a process, at the first use; the argument `target` chooses it for one
call, so that tests can compare targets. The kernels for frames of a camera are in `edgevlm.frames`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from edgevlm import _kernels
from edgevlm._arrays import check_image, translated_errors
from edgevlm.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgevlm.spec import Resample


#: More bands than this only repeat work: neighbouring bands both resample the rows that the two need.
_MOST_THREADS = 64


def targets() -> list[str]:
    """Names of the SIMD targets that this CPU can run, slowest first; `"scalar"` is always among them."""
    return list(_kernels.targets())


def active_target() -> str:
    """Name of the target that runs when a call asks for none: `EDGEVLM_KERNELS`, or else the fastest.

    Raises:
        KernelError: `EDGEVLM_KERNELS` names a target that does not exist or that this CPU cannot run.
    """
    with translated_errors():
        return str(_kernels.active())


def operators_library() -> str:
    """Path of the library that gives ONNX Runtime our operators: attention in integers, `edgevlm.QkvAttention`.

    Raises:
        KernelError: as `active_target`, whose target the operators use, too.
    """
    active_target()
    return str(_kernels.__file__)


def compiler() -> str:
    """Name and version of the compiler that made the kernels."""
    return _kernels.COMPILER


def resize(
    image_HWC: NDArray[np.uint8],
    height: int,
    width: int,
    resample: Resample = "bicubic",
    box: Sequence[float] | None = None,
    target: str | None = None,
    *,
    window: Sequence[int] | None = None,
    threads: int = 1,
) -> NDArray[np.uint8]:
    """Resample a picture to `height` x `width`, with antialiasing.

    Equal to `PIL.Image.Image.resize((width, height), resample, box)` of Pillow 13 to the last bit, for any size. All
    channels are treated alike: four channels equal Pillow's on "RGBX" or "CMYK", not on "RGBA", which Pillow
    multiplies by its alpha first.

    Args:
        image_HWC: uint8, (H, W) or (H, W, C) with C = 1, 3 or 4; any strides. Sides up to 2^24. It is copied first,
            unless the pixels of a row are packed, or RGB with one byte between them.
        height: Rows of the output, at least 1.
        width: Columns of the output, at least 1.
        resample: "box", "bilinear", "hamming", "bicubic" or "lanczos".
        box: Part of the source to use, (left, top, right, bottom) in pixels, fractions allowed; default: all of it.
        target: A name from `targets()`; default: the active target.
        window: Part of the output to compute, (top, left, rows, columns); default: all of it. The result is the slice
            `[top : top + rows, left : left + columns]` of what would come out without it, for less work.
        threads: Bands of output rows that are computed at the same time, at least 1. More never change the result.

    Returns:
        uint8, C-contiguous, with as many axes as `image_HWC`.

    Raises:
        ImageError: `image.array`, `image_HWC` is not such a picture.
        UsageError: A size, filter, box, window or `threads` is out of range.
        KernelError: The target does not exist, or this CPU cannot run it.

    Example:
        >>> import numpy as np
        >>> edges_HWC = np.array([[0, 255, 0, 255]], dtype=np.uint8)
        >>> resize(edges_HWC, 1, 2, "box")
        array([[128, 128]], dtype=uint8)
    """
    import numpy as np

    source_HWC = check_image(image_HWC, spaced=True)
    n_rows, n_columns, channels = source_HWC.shape
    size, box_ltrb, (top, left, rows, columns) = _check_geometry(height, width, box, window, (n_rows, n_columns))
    n_bands = _check_threads(threads, rows)

    def run(start: int, stop: int) -> None:
        corner = (top + start, left)
        _kernels.resize(source_HWC, out_HWC[start:stop], str(resample), size, box_ltrb, corner, target)

    with translated_errors():
        out_HWC = np.empty((rows, columns, channels), dtype=np.uint8)
        _in_bands(run, rows, n_bands)
    return out_HWC if image_HWC.ndim == 3 else out_HWC[:, :, 0]


def resize_tiles(
    image_HWC: NDArray[np.uint8],
    height: int,
    width: int,
    resample: Resample = "bicubic",
    box: Sequence[float] | None = None,
    target: str | None = None,
    *,
    border: Sequence[int] | None = None,
    window: Sequence[int] | None = None,
    canvas: Sequence[int] | None = None,
    tile: Sequence[int] | None = None,
    border_colour: Sequence[int] | None = None,
    canvas_colour: Sequence[int] | None = None,
    lut_C256: NDArray[np.float32] | None = None,
    out_TCHW: NDArray[Any] | None = None,
    threads: int = 1,
) -> NDArray[Any]:
    """Resample a picture straight into an encoder's input, in one pass over its pixels.

    The picture is laid into a `border`, resampled to `height` x `width`, the `window` of that is laid on a `canvas`,
    and the canvas is cut into tiles, row by row, with their channels in planes. Nothing of it is stored in between.
    Patches are small tiles: `tile=(16, 16)` gives rows for a graph that multiplies flattened patches.

    Args:
        image_HWC, height, width, resample, box, target: As for `resize`; `box` is in pixels of the picture with its
            border.
        border: (top, left, height, width): the picture lies at (top, left) of a larger one of this size; default: none.
        border_colour: One uint8 for each channel; default: zeros.
        window: Part of the output to compute, (top, left, rows, columns); default: all of it.
        canvas: (height, width, top, left): size of the canvas, and where on it the window lies; default: the window
            alone.
        tile: (height, width) of a tile; they must divide the canvas; default: one tile.
        canvas_colour: Of the canvas where the window does not cover it, before the table; default: zeros.
        lut_C256: float32 (C, 256): each sample is replaced by its entry; default: samples stay uint8.
        out_TCHW: Where the result goes, C-contiguous and writable, not overlapping the picture: a slice of a batch,
            say; default: a new array.
        threads: As for `resize`.

    Returns:
        `out_TCHW`: (T, C, tile height, tile width), float32 with a table and uint8 without one.

    Raises:
        ImageError: `image.array`, `image_HWC` is not such a picture.
        UsageError: A number, shape or type is out of range.
        KernelError: The target does not exist, or this CPU cannot run it.

    Example:
        >>> import numpy as np
        >>> grey_HWC = np.arange(16, dtype=np.uint8).reshape(4, 4)
        >>> resize_tiles(grey_HWC, 4, 4, tile=(2, 2))[1, 0]
        array([[2, 3],
               [6, 7]], dtype=uint8)
    """
    import numpy as np

    source_HWC = check_image(image_HWC, spaced=True)
    n_rows, n_columns, channels = source_HWC.shape
    border_tlhw = _whole_numbers("border", border, (0, 0, n_rows, n_columns))
    size, box_ltrb, window_tlhw = _check_geometry(height, width, box, window, border_tlhw[2:])
    canvas_hwtl = _whole_numbers("canvas", canvas, (*window_tlhw[2:], 0, 0))
    tile_hw = _whole_numbers("tile", tile, canvas_hwtl[:2])
    colours = [
        _colour("border_colour", border_colour, channels),
        _colour("canvas_colour", canvas_colour, channels),
    ]
    if min(tile_hw) < 1 or canvas_hwtl[0] % tile_hw[0] or canvas_hwtl[1] % tile_hw[1]:
        raise UsageError(f"tiles of {tile_hw} do not divide the canvas of {canvas_hwtl[:2]} (height, width)")
    top, left, rows, columns = window_tlhw
    n_bands = _check_threads(threads, rows)
    n_tiles = canvas_hwtl[0] // tile_hw[0] * (canvas_hwtl[1] // tile_hw[1])
    table = None if lut_C256 is None else _check_table(lut_C256, channels)
    out = _tiles_output(out_TCHW, (n_tiles, channels, *tile_hw), np.uint8 if table is None else np.float32)

    def run(start: int, stop: int) -> None:
        canvas_height, canvas_width, canvas_top, canvas_left = canvas_hwtl
        first_row = canvas_top + start if start else 0  # the outer bands store what is above and below the window
        end_row = canvas_top + stop if stop < rows else canvas_height
        place = (canvas_height, canvas_width, canvas_top + start, canvas_left, first_row, end_row)
        band_tlhw = (top + start, left, stop - start, columns)
        where = (size, box_ltrb, band_tlhw, border_tlhw, colours[0], place, colours[1])
        _kernels.resize_tiles(source_HWC, out, table, str(resample), *where, target)

    with translated_errors():
        _in_bands(run, rows, n_bands)
    return out


def _in_bands(run: Callable[[int, int], None], rows: int, n_bands: int) -> None:
    """Run all bands [start, stop) of `rows`, each in a thread of its own if there are several."""
    edges = [rows * i // n_bands for i in range(n_bands + 1)]
    if n_bands == 1:
        run(0, rows)
        return
    from concurrent.futures import ThreadPoolExecutor  # a quarter of what importing this module would cost

    with ThreadPoolExecutor(n_bands) as pool:
        list(pool.map(run, edges[:-1], edges[1:]))


def _colour(name: str, samples: Sequence[int] | None, channels: int) -> bytes:
    """One byte for each channel; None is black.

    Raises:
        UsageError: It is no colour of so many channels.
    """
    numbers = _whole_numbers(name, samples, (0,) * channels)
    if max(numbers) > 255:
        raise UsageError(f"{name} {samples}: samples go from 0 to 255")
    return bytes(numbers)


def _check_table(lut_C256: Any, channels: int) -> NDArray[np.float32]:
    """The table, packed.

    Raises:
        UsageError: It has another shape or type.
    """
    import numpy as np

    table = np.asarray(lut_C256)
    if table.dtype != np.float32 or table.shape != (channels, 256):
        raise UsageError(f"the table must be float32 ({channels}, 256), found {table.dtype} {table.shape}")
    return np.require(table, requirements=["C_CONTIGUOUS", "ALIGNED"])


def _tiles_output(out_TCHW: Any, shape: tuple[int, ...], dtype: type) -> NDArray[Any]:
    """The caller's array, checked, or a new one.

    Raises:
        UsageError: The caller's has another shape or type, or cannot be written.
    """
    import numpy as np

    if out_TCHW is None:
        return np.empty(shape, dtype=dtype)
    if not (
        isinstance(out_TCHW, np.ndarray)
        and out_TCHW.dtype == dtype
        and out_TCHW.shape == shape
        and out_TCHW.flags.c_contiguous
        and out_TCHW.flags.writeable
        and out_TCHW.flags.aligned
    ):
        raise UsageError(f"out_TCHW must be a writable, aligned, C-contiguous {np.dtype(dtype)} array {shape}")
    return out_TCHW


def _whole_numbers(name: str, values: Sequence[int] | None, default: tuple[int, ...]) -> tuple[int, ...]:
    """As many whole numbers as `default` has, within what the kernels take as a side.

    Raises:
        UsageError: They are something else.
    """
    if values is None:
        return default
    try:
        numbers = tuple(map(operator.index, values))
    except TypeError:
        numbers = ()
    if len(numbers) != len(default) or not all(0 <= number <= _kernels.MAX_SIDE for number in numbers):
        raise UsageError(f"{name} {values!r}: {len(default)} whole numbers from 0 to {_kernels.MAX_SIDE} are needed")
    return numbers


def _check_geometry(
    height: int,
    width: int,
    box: Sequence[float] | None,
    window: Sequence[int] | None,
    source_size: Sequence[int],
) -> tuple[tuple[int, int], tuple[float, float, float, float], tuple[int, ...]]:
    """Size (height, width), box (left, top, right, bottom) and window (top, left, rows, columns) of a resize.

    Raises:
        UsageError: One of them is out of range.
    """
    size = _whole_numbers("height and width", (height, width), (0, 0))
    window_tlhw = _whole_numbers("window", window, (0, 0, *size))
    rows, columns = source_size
    try:
        left, top, right, bottom = (0.0, 0.0, float(columns), float(rows)) if box is None else map(float, box)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"box {box!r}: four numbers are needed, left, top, right and bottom") from error
    if not all(side >= 1 for side in (*size, *window_tlhw[2:])):
        raise UsageError(f"resize to height {height}, width {width}, window {window}: sides are at least 1")
    return (size[0], size[1]), (left, top, right, bottom), window_tlhw


def _check_threads(threads: int, rows: int) -> int:
    """Number of bands; never more than there are rows to share.

    Raises:
        UsageError: `threads` is not a whole number of at least 1.
    """
    try:
        wanted = operator.index(threads)
    except TypeError as error:
        raise UsageError(f"threads {threads!r}: a whole number is needed") from error
    if wanted < 1:
        raise UsageError(f"threads {threads}: at least 1 is needed")
    return min(wanted, rows, _MOST_THREADS)
